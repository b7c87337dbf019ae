//! Memory that was never touched, of which the device writes a part.

use usvm::Config;
use usvm_tests::support::{K4, M2, Mem, alone, on_gpu, policy, runtime};

#[global_allocator]
static ALLOC: usvm::Routed<std::alloc::System> = usvm::Routed(std::alloc::System);

/// The page that came back brought a huge page into the shadow, of which only one was known: the range could not leave
/// again.
#[test]
fn a_range_of_which_one_page_was_written_goes_again_and_again() {
    let _alone = alone("a_range_of_which_one_page_was_written_goes_again_and_again", 60);
    for config in [policy("gpusvm"), Config::default()] {
        let rt = runtime(config, &[16 * M2]);
        for mem in [Mem::new(M2), Mem::huge(M2), Mem::small(M2)] {
            let (at, len) = (mem.at, mem.len);
            for round in 1..6u64 {
                on_gpu(&rt, move |gpu| gpu.store_u64(at + round * K4, round)).unwrap();
                assert_eq!(rt.residence(at, len).unwrap().device, len, "round {round}");
                // The CPU reads all of it: holes, too.
                mem.check_words(0, len, |word| match word * 8 {
                    offset if offset % K4 == 0 && (1..=round).contains(&(offset / K4)) => offset / K4,
                    _ => 0,
                });
                assert_eq!(rt.residence(at, len).unwrap().device, 0, "round {round}");
            }
        }
        rt.shutdown();
    }
}
