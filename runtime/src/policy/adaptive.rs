//! Migrates like the kernel, and learns from each range what the kernel cannot use: that a program edits a few pages
//! between launches, that everybody only reads, or that the device uses more than its memory holds.

use crate::ground::addr::SZ_64K;
use crate::space::ports::{Advice, Facts, GpuAccess, Placement, Policy, Return};

/// Ping-pongs after which a range comes back in blocks.
const BLOCKS_AFTER: u32 = 2;
/// Visits in a row that ended whole although blocks were tried: then blocks are not tried again for so many visits.
const GIVE_UP_AFTER: u32 = 2;
/// Every so many visits, blocks are tried again all the same.
const RETRY_EVERY: u32 = 16;
/// Evictions in a row after which a range is used over the link: those that are on the device then can stay there.
const REMOTE_AFTER: u32 = 2;

/// See the module.
#[derive(Debug)]
pub struct Adaptive;

impl Policy for Adaptive {
    fn name(&self) -> &'static str {
        "adaptive"
    }

    fn gpu_access(&self, facts: &Facts<'_>) -> Placement {
        let Advice { read_mostly, preferred, accessed_by } = facts.advice;
        let here = preferred == Some(Some(facts.device));
        // A device that is said to use memory wherever it lives does not draw it to itself.
        let over_the_link = preferred == Some(None) || !here && accessed_by == Some(facts.device);
        if over_the_link && facts.access != GpuAccess::Atomic {
            return Placement::Remote;
        }
        if facts.bracketed && facts.access == GpuAccess::Read && read_mostly && !here {
            return Placement::Share;
        }
        // What was announced for a launch fits, and will be used; who faults tells of one access.
        let pressed = facts.history.evictions >= REMOTE_AFTER && !facts.bracketed && !here;
        if pressed && facts.access != GpuAccess::Atomic { Placement::Remote } else { Placement::Migrate }
    }

    fn cpu_fault(&self, facts: &Facts<'_>) -> Return {
        let history = facts.history;
        let given_up =
            history.whole_returns >= GIVE_UP_AFTER && !history.to_device.is_multiple_of(RETRY_EVERY);
        if history.round_trips < BLOCKS_AFTER || given_up || facts.span.len() <= SZ_64K {
            return Return::Range;
        }
        // As read-ahead does: a little around a lone access, twice as much each time the CPU goes on where the last block
        // ended. A CPU that takes all pays six faults.
        let block = (2 * facts.sequential).next_power_of_two().max(SZ_64K);
        if block >= facts.span.len() { Return::Range } else { Return::Block(block) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ground::addr::{SZ_2M, Span};
    use crate::space::ports::History;

    fn facts(history: &History) -> Facts<'_> {
        Facts {
            span: Span::sized(SZ_2M, SZ_2M),
            access: GpuAccess::Read,
            bracketed: true,
            device: 0,
            advice: Advice::default(),
            sequential: 0,
            history,
        }
    }

    #[test]
    fn blocks_grow_for_a_cpu_that_goes_on() {
        let history = History { round_trips: BLOCKS_AFTER, to_device: 3, ..History::default() };
        let mut f = facts(&history);
        let mut sizes = Vec::new();
        while let Return::Block(size) = Adaptive.cpu_fault(&f) {
            assert_eq!(
                Adaptive.cpu_fault(&facts(&history)),
                Return::Block(SZ_64K),
                "a lone access stays small"
            );
            sizes.push(size);
            f.sequential += size;
        }
        assert_eq!(sizes, [64 << 10, 128 << 10, 512 << 10]);
    }

    #[test]
    fn calm_ranges_and_hopeless_ones_come_back_whole() {
        assert_eq!(Adaptive.cpu_fault(&facts(&History::default())), Return::Range);
        let hopeless =
            History { round_trips: 9, whole_returns: GIVE_UP_AFTER, to_device: 5, ..History::default() };
        assert_eq!(Adaptive.cpu_fault(&facts(&hopeless)), Return::Range);
        let again = History { to_device: RETRY_EVERY, ..hopeless };
        assert_eq!(Adaptive.cpu_fault(&facts(&again)), Return::Block(SZ_64K));
    }

    #[test]
    fn what_keeps_being_evicted_is_used_over_the_link() {
        let history = History { evictions: REMOTE_AFTER, ..History::default() };
        let mut f = facts(&history);
        assert_eq!(Adaptive.gpu_access(&f), Placement::Migrate, "it was announced");
        f.bracketed = false;
        assert_eq!(Adaptive.gpu_access(&f), Placement::Remote);
        f.access = GpuAccess::Atomic;
        assert_eq!(Adaptive.gpu_access(&f), Placement::Migrate);
        f.access = GpuAccess::Write;
        f.advice.preferred = Some(Some(f.device));
        assert_eq!(Adaptive.gpu_access(&f), Placement::Migrate, "the program knows better");
        let once = History { evictions: REMOTE_AFTER - 1, ..History::default() };
        let f = Facts { bracketed: false, ..facts(&once) };
        assert_eq!(Adaptive.gpu_access(&f), Placement::Migrate);
    }

    #[test]
    fn advice_is_followed() {
        let history = History::default();
        let mut f = facts(&history);
        assert_eq!(Adaptive.gpu_access(&f), Placement::Migrate);
        f.advice.read_mostly = true;
        assert_eq!(Adaptive.gpu_access(&f), Placement::Share);
        f.access = GpuAccess::Write;
        assert_eq!(Adaptive.gpu_access(&f), Placement::Migrate);
        f.advice.preferred = Some(None);
        assert_eq!(Adaptive.gpu_access(&f), Placement::Remote);
        f.access = GpuAccess::Atomic;
        assert_eq!(Adaptive.gpu_access(&f), Placement::Migrate);
        let placed = |access, preferred, accessed_by| {
            let mut f = facts(&history);
            f.access = access;
            f.advice = Advice { preferred, accessed_by, ..Advice::default() };
            Adaptive.gpu_access(&f)
        };
        assert_eq!(placed(GpuAccess::Write, None, Some(0)), Placement::Remote);
        assert_eq!(placed(GpuAccess::Atomic, None, Some(0)), Placement::Migrate);
        assert_eq!(placed(GpuAccess::Write, None, Some(1)), Placement::Migrate, "another device's advice");
        assert_eq!(placed(GpuAccess::Write, Some(Some(0)), Some(0)), Placement::Migrate, "it lives here");
    }
}
