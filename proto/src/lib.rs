//! Tributary's wire format: generated messages and gRPC stubs, and their conversion to checked types.
//!
//! Wire types stop at the door: what arrives is converted once, here, into types of `tributary-common` that
//! are valid by construction.

mod convert;

pub use convert::{Upload, WireError, chunk, chunk_data, digest, metrics, node_name, upload_header};

/// The protocol versions that this software speaks, oldest and newest.
pub const PROTOCOL_VERSIONS: std::ops::RangeInclusive<u32> = 1..=1;

/// The newest version in both ranges, or `None` when they do not meet.
pub fn negotiate(theirs: std::ops::RangeInclusive<u32>) -> Option<u32> {
    let newest = (*PROTOCOL_VERSIONS.end()).min(*theirs.end());
    (newest >= *PROTOCOL_VERSIONS.start() && newest >= *theirs.start()).then_some(newest)
}

/// Messages between a node and a coordinator.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::unwrap_used, rust_2018_idioms)] // generated
pub mod coordinator {
    tonic::include_proto!("tributary.coordinator.v1");
}

/// Messages between an operator and a coordinator.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::unwrap_used, rust_2018_idioms)] // generated
pub mod admin {
    tonic::include_proto!("tributary.admin.v1");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_meet_or_do_not() {
        assert_eq!(negotiate(1..=1), Some(1));
        assert_eq!(negotiate(1..=9), Some(1));
        assert_eq!(negotiate(2..=9), None);
        #[allow(clippy::reversed_empty_ranges)] // what a hostile peer may send
        let reversed = 3..=1;
        assert_eq!(negotiate(reversed), None);
    }
}
