//! This process's own memory, searched for secrets that should be gone.
#![cfg(target_os = "linux")]

use std::fs::File;
use std::os::unix::fs::FileExt as _;

/// What patterns are kept under, so that the search does not find itself.
const COVER: u64 = 0xa5c3_9617_f05a_3c69;
/// How much is read at a time.
const PART: usize = 1 << 20;

/// Sixteen secret bytes, covered.
#[derive(Clone, Copy)]
pub(super) struct Covered([u64; 2]);

impl Covered {
    pub(super) fn of(secret: &[u8; 16]) -> Self {
        let half = |at: usize| {
            let bytes: [u8; 8] = std::array::from_fn(|byte| secret[at + byte]);
            u64::from_le_bytes(bytes) ^ COVER
        };
        Self([half(0), half(8)])
    }
}

/// How many of the secrets are somewhere in this process's writable memory.
pub(super) fn found(secrets: &[Covered]) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let memory = File::open("/proc/self/mem").unwrap();
    let mut seen = vec![false; secrets.len()];
    let mut part = vec![0; PART + 15];
    for line in
        maps.lines().filter(|line| line.split_whitespace().nth(1).is_some_and(|how| how.starts_with("rw")))
    {
        let (from, to) = line.split_whitespace().next().unwrap().split_once('-').unwrap();
        let (from, to) = (u64::from_str_radix(from, 16).unwrap(), u64::from_str_radix(to, 16).unwrap());
        let mut at = from;
        while at < to {
            let length = part.len().min((to - at) as usize);
            // Pages of the kernel's, and what another test has given back by now.
            let Ok(read) = memory.read_at(&mut part[..length], at) else { break };
            for window in part[..read].windows(16) {
                let first = u64::from_le_bytes(std::array::from_fn(|byte| window[byte])) ^ COVER;
                for (secret, seen) in secrets.iter().zip(&mut seen) {
                    if first == secret.0[0] {
                        let second = u64::from_le_bytes(std::array::from_fn(|byte| window[8 + byte])) ^ COVER;
                        *seen |= second == secret.0[1];
                    }
                }
            }
            at += PART as u64;
        }
    }
    part.fill(0);
    seen.into_iter().filter(|seen| *seen).count()
}

/// Overwrites what earlier calls left on this thread's stack.
#[inline(never)]
pub(super) fn scrub_stack(depth: u32) -> u8 {
    let area = std::hint::black_box([0u8; 4096]);
    let below = if depth > 0 { scrub_stack(depth - 1) } else { 0 };
    std::hint::black_box(&area)[0] | below
}
