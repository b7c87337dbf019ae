//! `usvm devices`: what usvm can use, and what else is there.

use serde::Serialize;
use usvm::device::sim::{Profile, SimConfig};

use crate::cli::DevicesArgs;
use crate::drm::{self, Node};
use crate::{Outcome, say};

#[derive(Serialize)]
struct Devices {
    simulated: Vec<Simulated>,
    drm: Vec<Node>,
}

#[derive(Serialize)]
struct Simulated {
    name: &'static str,
    /// What to give to --device.
    device: String,
    memory_bytes: u64,
    link_gbps: f64,
    memory_gbps: f64,
    fault_us: f64,
    submit_us: f64,
    recoverable_faults: bool,
}

impl From<Profile> for Simulated {
    fn from(profile: Profile) -> Self {
        let default = profile == Profile::GENERIC;
        Self {
            name: profile.name,
            device: if default { "sim".into() } else { format!("sim:{}", profile.name) },
            memory_bytes: SimConfig::default().vram_bytes,
            link_gbps: profile.link_gbps,
            memory_gbps: profile.vram_gbps,
            fault_us: profile.fault_us,
            submit_us: profile.submit_us,
            recoverable_faults: profile.recoverable_faults,
        }
    }
}

/// `usvm devices`.
pub fn devices(args: &DevicesArgs) -> Outcome {
    let found = Devices { simulated: Profile::ALL.map(Simulated::from).into(), drm: drm::nodes() };
    say::done(if args.json { say::json(&found)? } else { table(&found) })
}

fn table(found: &Devices) -> String {
    let memory = say::bytes(SimConfig::default().vram_bytes);
    let mut text = format!(
        "simulated devices (in this process's own memory; {memory} unless --vram or USVM_VRAM says otherwise)\n\
         {:<16}{:>12}{:>12}{:>12}{:>12}  faults\n{:<16}{:>12}{:>12}{:>12}{:>12}\n",
        "--device", "link", "memory", "fault", "submit", "", "GB/s", "GB/s", "us", "us"
    );
    for sim in &found.simulated {
        let faults = if sim.recoverable_faults { "recoverable" } else { "end the work" };
        text += &format!(
            "{:<16}{:>12}{:>12}{:>12}{:>12}  {faults}\n",
            sim.device, sim.link_gbps, sim.memory_gbps, sim.fault_us, sim.submit_us
        );
    }
    text += "Costs are the modelled device's; the work itself runs at this machine's speed.\n\n";
    text += "DRM nodes (not used by this version of usvm)\n";
    if found.drm.is_empty() {
        text += "none: /dev/dri is empty or not there\n";
    }
    for node in &found.drm {
        let access = if node.accessible { "" } else { "; no permission (see usvm doctor)" };
        text += &format!("{:<24}{}{access}\n", node.path.display(), node.words());
    }
    text
}
