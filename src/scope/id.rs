//! Hashing a record's id.

use sha2::{Digest, Sha256};

use crate::record::RecordId;

/// SHA-256 over tagged fields with their lengths; collected first, since many small updates cost more than one.
#[derive(Clone)]
pub(super) struct IdHasher {
    input: [u8; 256],
    filled: usize,
    hash: Option<Sha256>,
}

impl IdHasher {
    pub(super) fn new() -> Self {
        Self {
            input: [0; 256],
            filled: 0,
            hash: None,
        }
    }

    pub(super) fn field(&mut self, tag: u8, bytes: &[u8]) {
        let mut head = [tag; 9];
        head[1..].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
        self.write(&head);
        self.write(bytes);
    }

    fn write(&mut self, bytes: &[u8]) {
        if self.filled + bytes.len() > self.input.len() {
            let hash = self.hash.get_or_insert_with(Sha256::new);
            hash.update(&self.input[..self.filled]);
            self.filled = 0;
            if bytes.len() > self.input.len() {
                hash.update(bytes);
                return;
            }
        }
        self.input[self.filled..self.filled + bytes.len()].copy_from_slice(bytes);
        self.filled += bytes.len();
    }

    pub(super) fn finish(&self) -> RecordId {
        let rest = &self.input[..self.filled];
        let digest = match &self.hash {
            None => Sha256::digest(rest),
            Some(hash) => hash.clone().chain_update(rest).finalize(),
        };
        RecordId::from_bytes(digest.into())
    }
}
