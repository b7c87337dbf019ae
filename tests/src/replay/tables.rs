//! The tables of meant differences in `ARCHITECTURE.md`, written from those that the comparers use.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use super::meant::MEANT;
use crate::live::rules;

const BEGIN: &str = "<!-- meant differences: written by usvm-replay --write-differences -->\n";
const END: &str = "<!-- end of meant differences -->\n";

/// Where they stand.
pub fn file() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../ARCHITECTURE.md")
}

/// What must stand between the marks.
fn tables() -> String {
    let mut text = String::from("\n");
    let _ = writeln!(
        text,
        "Bookkeeping (ranges, answers), where `SpaceConfig::kernel_exact` brings the kernel's way back:\n"
    );
    rows(&mut text, MEANT.iter().map(|m| [m.kernel, m.usvm, m.reason, m.predicate]));
    let _ = writeln!(
        text,
        "\nResidency of a running usvm with the kernel's policy (`gpusvm`); contents have no differences:\n"
    );
    rows(&mut text, rules::MEANT.iter().map(|m| [m.kernel, m.usvm, m.reason, m.predicate]));
    text.push('\n');
    text
}

fn rows<'a>(text: &mut String, rows: impl Iterator<Item = [&'a str; 4]>) {
    text.push_str("| drm_gpusvm | usvm | reason | when, exactly |\n|---|---|---|---|\n");
    for row in rows {
        let _ = writeln!(text, "| {} |", row.join(" | "));
    }
}

/// `document` with the tables as they must be.
///
/// # Errors
/// The marks are missing.
pub fn renewed(document: &str) -> Result<String, String> {
    let marked = document.split_once(BEGIN).and_then(|(head, rest)| Some((head, rest.split_once(END)?.1)));
    let (head, tail) = marked.ok_or("ARCHITECTURE.md has no marks for the meant differences")?;
    Ok([head, BEGIN, &tables(), END, tail].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_between_the_marks_is_replaced() {
        let document = format!("before\n{BEGIN}old\n{END}after\n");
        let new = renewed(&document).unwrap();
        assert!(new.starts_with("before\n") && new.ends_with("after\n") && !new.contains("old\n"));
        assert_eq!(renewed(&new).unwrap(), new);
        assert!(renewed("no marks").is_err());
    }
}
