//! Token buckets: how often a peer may do something.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};

use tributary_common::time::Time;

/// Most addresses that [`Rates`] remembers.
const ADDRESSES: usize = 4096;

/// Lets `burst` events through at once and `per_minute` in the long run.
#[derive(Debug, Clone)]
pub struct Bucket {
    per_minute: u32,
    burst: u32,
    /// Events left, in 1/60,000: one millisecond adds `per_minute` of them.
    left: u64,
    filled: Time,
}

/// How many 1/60,000 one event costs.
const EVENT: u64 = 60_000;

impl Bucket {
    /// A full bucket. Both rates are at least 1.
    pub fn new(per_minute: u32, burst: u32, now: Time) -> Self {
        let (per_minute, burst) = (per_minute.max(1), burst.max(1));
        Self { per_minute, burst, left: u64::from(burst) * EVENT, filled: now }
    }

    /// Counts one event. `Err` holds the seconds after which the next one is possible, at least 1.
    pub fn take(&mut self, now: Time) -> Result<(), u64> {
        self.fill(now);
        match self.left.checked_sub(EVENT) {
            Some(left) => {
                self.left = left;
                Ok(())
            }
            None => Err((EVENT - self.left).div_ceil(u64::from(self.per_minute)).div_ceil(1000).max(1)),
        }
    }

    fn fill(&mut self, now: Time) {
        let milliseconds = now.0.saturating_sub(self.filled.0);
        let gained = milliseconds.saturating_mul(u64::from(self.per_minute));
        self.left = self.left.saturating_add(gained).min(u64::from(self.burst) * EVENT);
        self.filled = now;
    }

    fn is_full(&mut self, now: Time) -> bool {
        self.fill(now);
        self.left == u64::from(self.burst) * EVENT
    }
}

/// A bucket per peer address, so that one peer does not use up what others need.
///
/// IPv6 peers share the bucket of their /64 network. At most 4,096 addresses are remembered; while so many
/// have been busy within the last minute, new ones are refused.
#[derive(Debug)]
pub struct Rates {
    per_minute: u32,
    buckets: BTreeMap<IpAddr, Bucket>,
}

impl Rates {
    /// Lets each address do `per_minute` events a minute, and as many at once.
    pub fn new(per_minute: u32) -> Self {
        Self { per_minute, buckets: BTreeMap::new() }
    }

    /// Counts one event of `address`. `Err` holds the seconds after which the next one is possible.
    pub fn take(&mut self, address: IpAddr, now: Time) -> Result<(), u64> {
        let key = match address {
            IpAddr::V6(v6) => match v6.to_ipv4_mapped() {
                Some(v4) => IpAddr::V4(v4),
                None => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64)),
            },
            v4 => v4,
        };
        if self.buckets.len() >= ADDRESSES && !self.buckets.contains_key(&key) {
            self.buckets.retain(|_, bucket| !bucket.is_full(now));
            if self.buckets.len() >= ADDRESSES {
                return Err(60);
            }
        }
        let fresh = || Bucket::new(self.per_minute, self.per_minute, now);
        self.buckets.entry(key).or_insert_with(fresh).take(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_lets_a_burst_through_and_then_the_rate() {
        let mut bucket = Bucket::new(60, 3, Time(0));
        for _ in 0..3 {
            assert_eq!(bucket.take(Time(0)), Ok(()));
        }
        assert_eq!(bucket.take(Time(0)), Err(1));
        assert_eq!(bucket.take(Time(999)), Err(1));
        assert_eq!(bucket.take(Time(1000)), Ok(()));
        assert_eq!(bucket.take(Time(1000)), Err(1));
        // A long rest refills it to the burst, not beyond; a clock that steps back gives nothing.
        for _ in 0..3 {
            assert_eq!(bucket.take(Time(1_000_000)), Ok(()));
        }
        assert!(bucket.take(Time(1_000_000)).is_err());
        assert!(bucket.take(Time(0)).is_err());
        let mut slow = Bucket::new(2, 1, Time(0));
        assert_eq!((slow.take(Time(0)), slow.take(Time(0))), (Ok(()), Err(30)));
    }

    #[test]
    fn one_address_does_not_use_up_what_another_needs() {
        let mut rates = Rates::new(1);
        let take = |rates: &mut Rates, text: &str, now| rates.take(text.parse().unwrap(), Time(now));
        assert_eq!(take(&mut rates, "192.0.2.1", 0), Ok(()));
        assert_eq!(take(&mut rates, "192.0.2.1", 0), Err(60));
        assert_eq!(take(&mut rates, "::ffff:192.0.2.1", 0), Err(60));
        assert_eq!(take(&mut rates, "192.0.2.2", 0), Ok(()));
        assert_eq!(take(&mut rates, "2001:db8::1", 0), Ok(()));
        assert_eq!(take(&mut rates, "2001:db8::2", 0), Err(60));
        assert_eq!(take(&mut rates, "2001:db8:0:1::2", 0), Ok(()));
        assert_eq!(take(&mut rates, "192.0.2.1", 60_000), Ok(()));
    }

    #[test]
    fn memory_is_bounded_however_many_addresses_come() {
        let mut rates = Rates::new(1);
        for host in 0..10_000u32 {
            let _ = rates.take(IpAddr::from(host.to_be_bytes()), Time(0));
        }
        assert_eq!(rates.buckets.len(), ADDRESSES);
        assert_eq!(rates.take(IpAddr::from([9, 9, 9, 9]), Time(1)), Err(60));
        assert_eq!(rates.take(IpAddr::from([9, 9, 9, 9]), Time(60_000)), Ok(()));
        assert_eq!(rates.buckets.len(), 1);
    }
}
