//! What a store sees in place of ids and fingerprints. Both are plain hashes, of keys and of bodies, which whoever
//! guesses could confirm.

use aes_gcm_siv::KeyInit;
use cbc::cipher::{BlockModeDecrypt, BlockModeEncrypt, InnerIvInit};
use hmac::{Hmac, Mac};
use sha2::Sha256;

use super::keys::SecretKey;
use crate::{fingerprint::Fingerprint, record::RecordId};

/// What a MAC is for: each begins with a byte that none of the others has.
#[derive(Clone, Copy)]
#[repr(u8)]
enum Purpose {
    /// The id of a record: 32 bytes follow.
    Id = 1,
    /// Where the encryption of a digest starts: the record's id and the fingerprint's algorithm follow.
    Digest = 2,
    /// The key that digests are encrypted with.
    DigestKey = 3,
    /// What tells this secret from others.
    Check = 4,
}

pub(super) struct LookUp {
    /// HMAC-SHA256 (RFC 2104) under the look-up secret.
    mac: Hmac<Sha256>,
    digests: aes::Aes256,
}

impl LookUp {
    pub(super) fn new(secret: &SecretKey) -> Self {
        // As HMAC does with a key that is shorter than a block; the library wants it whole or may fail.
        let mut block = zeroize::Zeroizing::new([0; 64]);
        block[..32].copy_from_slice(secret.as_bytes());
        let mac = Hmac::new((&*block).into());
        let key = zeroize::Zeroizing::new(finish(&mac, Purpose::DigestKey, &[]));
        let digests = aes::Aes256::new((&*key).into());
        Self { mac, digests }
    }

    /// The same for the same secret, and nothing that tells the secret.
    pub(super) fn check(&self) -> [u8; 32] {
        finish(&self.mac, Purpose::Check, &[])
    }

    pub(super) fn id(&self, id: &RecordId) -> RecordId {
        RecordId::from_bytes(finish(&self.mac, Purpose::Id, &[id.as_bytes()]))
    }

    /// The fingerprint that is stored in place of `fingerprint`. It comes back by [`show`](Self::show), since the core
    /// compares: a digest is encrypted, not hashed again.
    ///
    /// AES-256-CBC over its two blocks, from a start that is secret and belongs to record and algorithm. The same
    /// digest looks the same under one record only, and a changed one comes back as no digest of anything.
    pub(super) fn hide(&self, id: &RecordId, fingerprint: &Fingerprint) -> Fingerprint {
        let mut blocks = blocks(fingerprint.digest());
        cbc::Encryptor::inner_iv_init(&self.digests, &self.start(id, fingerprint)).encrypt_blocks(&mut blocks);
        joined(fingerprint.algorithm(), &blocks)
    }

    pub(super) fn show(&self, id: &RecordId, hidden: &Fingerprint) -> Fingerprint {
        let mut blocks = blocks(hidden.digest());
        cbc::Decryptor::inner_iv_init(&self.digests, &self.start(id, hidden)).decrypt_blocks(&mut blocks);
        joined(hidden.algorithm(), &blocks)
    }

    fn start(&self, id: &RecordId, fingerprint: &Fingerprint) -> aes::Block {
        let mac = finish(&self.mac, Purpose::Digest, &[id.as_bytes(), &[fingerprint.algorithm()]]);
        halves(&mac)[0].into()
    }
}

fn finish(mac: &Hmac<Sha256>, purpose: Purpose, parts: &[&[u8]]) -> [u8; 32] {
    let mut mac = mac.clone();
    mac.update(&[purpose as u8]);
    parts.iter().for_each(|part| mac.update(part));
    mac.finalize().into_bytes().into()
}

fn halves(bytes: &[u8; 32]) -> [[u8; 16]; 2] {
    let (mut first, mut second) = ([0; 16], [0; 16]);
    first.copy_from_slice(&bytes[..16]);
    second.copy_from_slice(&bytes[16..]);
    [first, second]
}

fn blocks(digest: &[u8; 32]) -> [aes::Block; 2] {
    halves(digest).map(aes::Block::from)
}

fn joined(algorithm: u8, blocks: &[aes::Block; 2]) -> Fingerprint {
    let mut digest = [0; 32];
    digest[..16].copy_from_slice(&blocks[0]);
    digest[16..].copy_from_slice(&blocks[1]);
    Fingerprint::new(algorithm, digest)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn look_up(byte: u8) -> LookUp {
        LookUp::new(&SecretKey::from_bytes([byte; 32]))
    }

    fn id(byte: u8) -> RecordId {
        RecordId::from_bytes([byte; 32])
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// As they were first released, made by another library. They are in stores: they never change.
    #[test]
    fn ids_fingerprints_and_the_check_are_made_as_they_were_first_released() {
        let look_up = look_up(7);
        let digest = std::array::from_fn(|at| at as u8);
        let hidden = look_up.hide(&id(3), &Fingerprint::new(5, digest));
        assert_eq!(
            hex(look_up.id(&id(3)).as_bytes()),
            "4653a29465a3b59c3146d97f21d2307a9644af795059b86d1887941259568756"
        );
        assert_eq!(
            hex(hidden.digest()),
            "1ece9374fb42f2e27533b7402502f2ce498ea8008f8acd6da3ad3198210d043a"
        );
        assert_eq!(
            hex(&look_up.check()),
            "7741ecce088f97ab069161c9c5f9d4b36d0de66177c06d86c9d7a8d48a37b097"
        );
    }

    #[test]
    fn a_hidden_fingerprint_comes_back_as_it_was() {
        let look_up = look_up(1);
        for algorithm in [0, 1, 4, 200] {
            for digest in [[0; 32], [0xff; 32], std::array::from_fn(|at| at as u8)] {
                let plain = Fingerprint::new(algorithm, digest);
                let hidden = look_up.hide(&id(1), &plain);
                assert_eq!(hidden.algorithm(), algorithm, "who reads the store still knows it");
                assert_eq!(look_up.show(&id(1), &hidden), plain);
            }
        }
    }

    #[test]
    fn nothing_looks_the_same_under_another_secret_record_or_algorithm() {
        let mut seen = HashSet::new();
        for secret in [1, 2] {
            let look_up = look_up(secret);
            assert!(seen.insert(look_up.check()));
            for record in [1, 2] {
                assert!(seen.insert(*look_up.id(&id(record)).as_bytes()));
                for algorithm in [1, 2] {
                    let hidden = look_up.hide(&id(record), &Fingerprint::new(algorithm, [7; 32]));
                    // The halves of a digest are equal here, and do not look so.
                    let [first, second] = halves(hidden.digest());
                    assert_ne!(first, second);
                    assert!(seen.insert(*hidden.digest()));
                }
            }
        }
        assert_eq!(seen.len(), 2 + 4 + 8);
    }

    #[test]
    fn a_changed_fingerprint_or_one_of_another_record_is_another_one() {
        let look_up = look_up(1);
        let plain = Fingerprint::new(1, [7; 32]);
        let hidden = look_up.hide(&id(1), &plain);
        assert_ne!(look_up.show(&id(2), &hidden), plain);
        for bit in 0..256 {
            let mut digest = *hidden.digest();
            digest[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(look_up.show(&id(1), &Fingerprint::new(1, digest)), plain);
        }
    }
}
