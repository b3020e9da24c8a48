//! Files of state that end with a digest of what is before it, so that a damaged one is known.

use super::container::DecodeError;
use crate::digest::Digest;

const DIGEST_BYTES: usize = 32;

/// What a file of state is.
pub(super) struct Kind {
    pub(super) what: &'static str,
    pub(super) magic: [u8; 4],
    pub(super) version: u8,
}

impl Kind {
    /// The beginning of such a file: magic, version, and `variant`.
    pub(super) fn open(&self, variant: u8) -> Vec<u8> {
        let [first, second, third, fourth] = self.magic;
        vec![first, second, third, fourth, self.version, variant, 0, 0]
    }

    /// Appends the digest.
    pub(super) fn seal(mut bytes: Vec<u8>) -> Vec<u8> {
        let digest = Digest::of(&bytes);
        bytes.extend(digest.0);
        bytes
    }

    /// The variant of a whole file, and its contents.
    pub(super) fn unseal<'a>(&self, bytes: &'a [u8]) -> Result<(u8, Contents<'a>), DecodeError> {
        let damaged = DecodeError::Damaged(self.what);
        let (sealed, digest) = bytes.split_last_chunk::<DIGEST_BYTES>().ok_or(damaged.clone())?;
        let (head, rest) = sealed.split_first_chunk().ok_or(damaged.clone())?;
        let [first, second, third, fourth, version, variant, zero, nought] = *head;
        if [first, second, third, fourth] != self.magic {
            return Err(DecodeError::Magic(self.what));
        }
        if version != self.version {
            return Err(DecodeError::Version { found: version, expected: self.version });
        }
        if Digest::of(sealed).0 != *digest || [zero, nought] != [0, 0] {
            return Err(damaged);
        }
        Ok((variant, Contents { what: self.what, rest }))
    }
}

/// What is left of a file's contents.
pub(super) struct Contents<'a> {
    what: &'static str,
    rest: &'a [u8],
}

impl<'a> Contents<'a> {
    /// The next `count` bytes.
    pub(super) fn bytes(&mut self, count: usize) -> Result<&'a [u8], DecodeError> {
        let length = DecodeError::Length { what: self.what, found: self.rest.len(), expected: count };
        let (bytes, rest) = self.rest.split_at_checked(count).ok_or(length)?;
        self.rest = rest;
        Ok(bytes)
    }

    /// The next `N` bytes.
    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let bytes = self.bytes(N)?;
        bytes.try_into().map_err(|_| DecodeError::Damaged(self.what))
    }

    /// The next `count` floats, all finite.
    pub(super) fn floats(&mut self, count: usize) -> Result<Vec<f32>, DecodeError> {
        let (words, _) = self.bytes(count.saturating_mul(4))?.as_chunks();
        let values: Vec<f32> = words.iter().map(|word| f32::from_le_bytes(*word)).collect();
        match values.iter().position(|value| !value.is_finite()) {
            Some(at) => Err(DecodeError::Value { at, reason: "not a finite number" }),
            None => Ok(values),
        }
    }

    /// All that is left.
    pub(super) fn remainder(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    /// Refuses what is left over.
    pub(super) fn end(self) -> Result<(), DecodeError> {
        match self.rest.len() {
            0 => Ok(()),
            found => Err(DecodeError::Length { what: self.what, found, expected: 0 }),
        }
    }
}
