//! Man pages and shell completions, made from the command line's own definition.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use clap::CommandFactory;
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};
use usvm::ground::config;

use crate::cli::Args;
use crate::{Outcome, say};

/// What the program reads from the environment and the configuration does not.
const OWN_VARIABLES: [(&str, &str); 2] = [
    (
        "USVM_PRELOAD_LIBRARY",
        "The library that usvm run preloads, instead of the one found beside the program.",
    ),
    ("USVM_HEAP", "Whether usvm's allocator serves the program's malloc under usvm run."),
];

/// `usvm completions`.
pub fn completions(shell: Shell) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Args::command(), "usvm", &mut script);
    say::done(script)
}

/// `usvm man`.
pub fn man(directory: Option<&Path>) -> Outcome {
    let mut command = Args::command();
    command.build();
    let Some(directory) = directory else {
        return say::done(page(&command, true).map_err(|e| e.to_string())?);
    };
    let failed = |e: io::Error| format!("{}: {e}", directory.display());
    fs::create_dir_all(directory).map_err(failed)?;
    write(directory, &command, true).map_err(failed)?;
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
        let name = format!("usvm-{}", sub.get_name());
        write(directory, &sub.clone().name(name), false).map_err(failed)?;
    }
    Ok(0)
}

fn write(directory: &Path, command: &clap::Command, main: bool) -> io::Result<()> {
    fs::write(directory.join(format!("{}.1", command.get_name())), page(command, main)?)
}

/// One page; the main one has the environment and the files as well.
fn page(command: &clap::Command, main: bool) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    let man = Man::new(command.clone()).source(concat!("usvm ", env!("CARGO_PKG_VERSION"))).manual("usvm");
    man.render_title(&mut text)?;
    man.render_name_section(&mut text)?;
    man.render_synopsis_section(&mut text)?;
    man.render_description_section(&mut text)?;
    if command.get_arguments().next().is_some() {
        man.render_options_section(&mut text)?;
    }
    if command.has_subcommands() {
        man.render_subcommands_section(&mut text)?;
    }
    if let Some(notes) = command.get_after_help() {
        notes_section(&notes.to_string(), &mut text)?;
    }
    if main {
        environment_section(&mut text)?;
    }
    let mut see = Roff::new();
    let others = if main {
        "usvm-run(1), usvm-doctor(1), usvm-devices(1), usvm-top(1), usvm-stats(1), ld.so(8)"
    } else {
        "usvm(1)"
    };
    see.control("SH", ["SEE ALSO"]).text([roman(others)]);
    see.to_writer(&mut text)?;
    Ok(text)
}

/// The words after the options: each paragraph with a title of its own becomes a section.
fn notes_section(notes: &str, text: &mut dyn Write) -> io::Result<()> {
    let titles = [("Examples:", "EXAMPLES"), ("Exit status:", "EXIT STATUS"), ("JSON (--json):", "JSON")];
    let mut roff = Roff::new();
    let mut section = "";
    for paragraph in notes.split("\n\n") {
        let titled = titles.iter().find_map(|(start, title)| Some((*title, paragraph.strip_prefix(start)?)));
        let (title, words) = titled.unwrap_or(("NOTES", paragraph));
        if title != section {
            roff.control("SH", [title]);
            section = title;
        } else {
            roff.control("PP", []);
        }
        // What is indented is to be typed, or a form.
        let (to_type, prose): (Vec<_>, Vec<_>) =
            words.lines().filter(|line| !line.is_empty()).partition(|line| line.starts_with("  "));
        prose.into_iter().for_each(|line| {
            roff.text([roman(line.trim())]);
        });
        if !to_type.is_empty() {
            roff.control("nf", []);
            to_type.into_iter().for_each(|line| {
                roff.text([roman(line)]);
            });
            roff.control("fi", []);
        }
    }
    roff.to_writer(text)
}

fn environment_section(text: &mut dyn Write) -> io::Result<()> {
    let mut roff = Roff::new();
    roff.control("SH", ["ENVIRONMENT"]);
    roff.text([roman(
        "Read by every program that runs usvm, except where it has more rights than its caller.",
    )]);
    let own = config::OPTIONS.iter().filter_map(|row| Some((row.env?, row)));
    for (name, row) in own {
        let default = format!("{}. Allowed: {}. Default: {}.", row.help, row.allowed, row.default);
        roff.control("TP", []).text([bold(name)]).text([roman(default)]);
    }
    let keys: Vec<_> = config::OPTIONS.iter().map(|row| row.key).collect();
    let further = format!("key=value;key=value with any of the keys {}.", keys.join(", "));
    roff.control("TP", []).text([bold(config::CONF)]).text([roman(further)]);
    for (name, help) in OWN_VARIABLES {
        roff.control("TP", []).text([bold(name)]).text([roman(help)]);
    }
    roff.to_writer(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_names_every_variable_and_command() {
        let page = String::from_utf8(page(&Args::command(), true).unwrap()).unwrap();
        for name in config::variables() {
            assert!(page.contains(name), "{name}");
        }
        for sub in Args::command().get_subcommands().filter(|sub| !sub.is_hide_set()) {
            assert!(page.contains(&format!("usvm\\-{}", sub.get_name())), "{}", sub.get_name());
        }
        assert!(!page.contains("usvm\\-load"), "hidden commands stay hidden");
    }
}
