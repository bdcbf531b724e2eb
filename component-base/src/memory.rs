//! What a daemon gives back to the kernel while it runs.
//!
//! Most of an idle daemon's memory is program text: starting runs through a large part of it once, and the kernel maps 64 KB around
//! each place that runs. Such pages hold nothing that is not in the program's file. They are let go now and then: what goes on
//! running is mapped again from the page cache, a few hundred faults of about a microsecond; the rest is the kernel's to reclaim first.
//! What the C library's allocator keeps of freed memory goes at the same time; programs with jemalloc have next to nothing there.
//!
//! The one place of the workspace with `unsafe`: it calls the kernel and the C library with ranges that the kernel told.
#![allow(unsafe_code)]

use std::ops::Range;
use std::time::Duration;

use tracing::{debug, trace};

/// Once the start is over, and then again and again.
const FIRST: Duration = Duration::from_secs(10);
const PERIOD: Duration = Duration::from_secs(60);

/// Gives back what is not in use, every minute, for ever.
pub(crate) async fn keep_small() {
    let ranges = match std::fs::read_to_string("/proc/self/maps") {
        Ok(maps) => unwritten(&maps),
        Err(error) => {
            debug!(%error, "program text is not let go: /proc/self/maps cannot be read");
            return;
        }
    };
    tokio::time::sleep(FIRST).await;
    loop {
        for range in &ranges {
            let_go(range);
        }
        // SAFETY: gives free memory of the C library's own heap back; takes its locks itself.
        #[cfg(target_env = "gnu")]
        unsafe {
            libc::malloc_trim(0)
        };
        tokio::time::sleep(PERIOD).await;
    }
}

fn let_go(range: &Range<usize>) {
    // SAFETY: the range is a whole mapping of a file that nobody writes to, of which every page can be read from that file again: what
    // is mapped anew is what was there. Nothing unmaps it: the program and its libraries stay loaded until the process ends.
    let code = unsafe { libc::madvise(range.start as *mut libc::c_void, range.len(), libc::MADV_DONTNEED) };
    if code != 0 {
        trace!(error = %std::io::Error::last_os_error(), "text not let go");
    }
}

/// The mappings of programs and libraries that nothing ever writes to: text, and what stands before it in the same file. What is
/// read-only behind the text may have been written by the loader (relocations), and has to stay.
fn unwritten(maps: &str) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    // Read-only mappings of a file whose text has not come yet.
    let mut before: (&str, Vec<Range<usize>>) = ("", Vec::new());
    for line in maps.lines() {
        let mut fields = line.split_ascii_whitespace();
        let (Some(range), Some(permissions)) = (fields.next(), fields.next()) else { continue };
        let Some(file) = fields.nth(3).filter(|file| file.starts_with('/')) else { continue };
        let Some((start, end)) = range.split_once('-') else { continue };
        let (Ok(start), Ok(end)) = (usize::from_str_radix(start, 16), usize::from_str_radix(end, 16)) else { continue };
        if before.0 != file {
            before = (file, Vec::new());
        }
        match permissions {
            "r--p" => before.1.push(start..end),
            "r-xp" => {
                found.append(&mut before.1);
                found.push(start..end);
            }
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_what_stands_before_it_is_never_written() {
        let maps = "\
5580_0000-5580_1000 r--p 00000000 fe:00 11 /usr/bin/kubelet
5580_1000-5580_3000 r-xp 00001000 fe:00 11 /usr/bin/kubelet
5580_3000-5580_4000 r--p 00003000 fe:00 11 /usr/bin/kubelet
5580_4000-5580_5000 rw-p 00004000 fe:00 11 /usr/bin/kubelet
5590_0000-5591_0000 rw-p 00000000 00:00 0 [heap]
7f00_0000-7f00_1000 r--p 00000000 fe:00 12 /etc/ld.so.cache
7f01_0000-7f01_2000 r-xp 00000000 fe:00 13 /lib/x86_64-linux-gnu/libc.so.6
7f02_0000-7f02_2000 rwxp 00000000 fe:00 14 /lib/odd.so
7ffc_0000-7ffc_1000 r-xp 00000000 00:00 0 [vdso]
nonsense
"
        .replace('_', "");
        let found = [0x5580_0000..0x5580_1000, 0x5580_1000..0x5580_3000, 0x7f01_0000..0x7f01_2000];
        assert_eq!(unwritten(&maps), found);
    }

    /// This process has mapped more of its text before than after, and goes on.
    #[test]
    fn what_is_let_go_comes_back() {
        let ranges = unwritten(&std::fs::read_to_string("/proc/self/maps").unwrap());
        let mapped = || -> u64 {
            let rollup = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
            let line = |name: &str| rollup.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
            let kilobytes = |name: &str| line(name).trim_end_matches(" kB").trim().parse::<u64>().unwrap();
            kilobytes("Rss:") - kilobytes("Anonymous:")
        };
        // Reads through all of it, as a start would.
        let sum = |range: &Range<usize>| -> u64 {
            // SAFETY: readable, as its permissions say.
            range.clone().step_by(4096).map(|at| u64::from(unsafe { *(at as *const u8) })).sum()
        };
        let before: Vec<u64> = ranges.iter().map(sum).collect();
        let all = mapped();
        ranges.iter().for_each(let_go);
        assert!(mapped() < all / 2, "{} kB of {all} are still mapped", mapped());
        assert_eq!(ranges.iter().map(sum).collect::<Vec<_>>(), before);
    }
}
