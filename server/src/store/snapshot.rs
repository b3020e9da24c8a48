//! All that a store on a disk holds, of one moment, for a backup; and a new store made of it.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use tributary_common::digest::Digest;

use super::{SledStore, StoreError, missing_model};

/// Kinds of entries that no snapshot takes. A token that was used later would work again; a secure-aggregation session
/// that was ended later would be taken up again.
const LEFT_OUT: [&str; 2] = ["token/", "session/"];

/// Entries per write when a store is made of them.
const ENTRIES_PER_WRITE: usize = 64;

/// What a store held at one moment. As long as it is there, the store deletes no model.
#[derive(Debug)]
pub struct Snapshot<'a> {
    store: &'a SledStore,
    entries: Vec<(String, String)>,
    models: BTreeSet<Digest>,
}

impl SledStore {
    /// What the store holds, and what `beside` returns; during both no write is made.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Io`].
    pub fn snapshot<T>(&self, beside: impl FnOnce() -> T) -> Result<(Snapshot<'_>, T), StoreError> {
        self.database.write(|_| {
            let mut entries = self.database.texts()?;
            entries.retain(|(key, _)| !LEFT_OUT.iter().any(|kind| key.starts_with(kind)));
            let models = self.named()?;
            self.snapshots.fetch_add(1, Ordering::AcqRel);
            Ok((Snapshot { store: self, entries, models }, beside()))
        })
    }

    /// Stores the bytes of a model or a state of a snapshot, durable on return; the caller has checked the digest.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn put_content(
        &self,
        digest: Digest,
        parts: impl Iterator<Item = Vec<u8>>,
    ) -> Result<(), StoreError> {
        self.models.put(digest, parts)
    }

    /// Stores the entries of a snapshot; what they name must be stored already.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] if one is not the JSON of an entry; [`StoreError::Missing`] if a model is not there.
    pub fn put_entries(&self, entries: &[(String, String)]) -> Result<(), StoreError> {
        for some in entries.chunks(ENTRIES_PER_WRITE) {
            self.database.write(|write| {
                some.iter().try_for_each(|(key, json)| write.put_text(key.clone(), json.clone()))
            })?;
        }
        for digest in self.named()? {
            self.models.length(digest)?.ok_or_else(|| missing_model(digest))?;
        }
        Ok(())
    }
}

impl Snapshot<'_> {
    /// The entries: key, and value as JSON.
    pub fn entries(&self) -> &[(String, String)] {
        &self.entries
    }

    /// The models and states that the entries name, each with its length in bytes.
    ///
    /// # Errors
    /// [`StoreError::Missing`], [`StoreError::Io`].
    pub fn models(&self) -> Result<Vec<(Digest, u64)>, StoreError> {
        let length = |digest: &Digest| {
            let length = self.store.models.length(*digest)?;
            Ok((*digest, length.ok_or_else(|| missing_model(*digest))?))
        };
        self.models.iter().map(length).collect()
    }

    /// Hands the bytes of a model or state to `take`, part after part; they are good only if this returns `Ok`.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Io`].
    pub fn read(&self, digest: Digest, take: impl FnMut(&[u8])) -> Result<(), StoreError> {
        self.store.models.read(digest, take)
    }
}

impl Drop for Snapshot<'_> {
    fn drop(&mut self) {
        self.store.snapshots.fetch_sub(1, Ordering::AcqRel);
    }
}
