//! The sealed answer and its bytes, all numbers little-endian:
//!
//! | bytes | content |
//! |---|---|
//! | 1 | version, 1 |
//! | 4 | id of the key |
//! | 12 | nonce |
//! | n | the stored answer, encrypted |
//! | 16 | tag |
//!
//! AES-256-GCM-SIV (RFC 8452). The associated data is the version, whether the answer is kept (1 or 0), the key's id and
//! the record's id, so none of them can be exchanged. A store keeps these bytes as the body of an answer that says
//! nothing else, since some stores read what they keep.

use aes_gcm_siv::{AeadInOut, Nonce, Tag, aead::inout::InOutBuf};
use bytes::{Buf, Bytes};

use super::{
    error::Unopened,
    keys::{Key, KeyRing},
};
use crate::{
    codec::StoredResponse,
    error::{StoreError, StoreErrorKind},
    random,
    record::RecordId,
};

const VERSION: u8 = 1;
const NONCE: usize = 12;
const TAG: usize = 16;
/// What stands before the encrypted answer.
const HEAD: usize = 1 + 4 + NONCE;

/// # Errors
/// `Unavailable` if there is no randomness for a nonce, `Other` if the answer is longer than the cipher takes (64 GiB).
pub(super) fn seal(ring: &KeyRing, id: &RecordId, response: &StoredResponse) -> Result<StoredResponse, StoreError> {
    let nonce = random::bytes().map_err(|error| StoreError::with_source(StoreErrorKind::Unavailable, error))?;
    seal_with(ring.sealer(), &nonce, id, response)
}

fn seal_with(
    key: &Key,
    nonce: &[u8; NONCE],
    id: &RecordId,
    response: &StoredResponse,
) -> Result<StoredResponse, StoreError> {
    let plain = response.as_bytes();
    let mut out = StoredResponse::opaque_head(response.is_kept(), HEAD + plain.len() + TAG);
    out.push(VERSION);
    out.extend_from_slice(&key.id.to_le_bytes());
    out.extend_from_slice(nonce);
    let start = out.len();
    out.extend_from_slice(plain);
    let bound = bound(response.is_kept(), key.id, id);
    let text = InOutBuf::from(&mut out[start..]);
    let tag = key.cipher.encrypt_inout_detached(&Nonce::from(*nonce), &bound, text);
    let tag = tag.map_err(|error| StoreError::with_source(StoreErrorKind::Other, error))?;
    out.extend_from_slice(&tag);
    StoredResponse::from_bytes(out.into())
}

/// # Errors
/// `Corrupt` with the reason as its source, or `NewerVersion`.
pub(super) fn open(ring: &KeyRing, id: &RecordId, sealed: &StoredResponse) -> Result<StoredResponse, StoreError> {
    let mut rest = sealed.opaque_body()?.ok_or(Unopened::NotSealed)?;
    match rest.first() {
        Some(&VERSION) if rest.len() >= HEAD + TAG => rest.advance(1),
        Some(&newer) if newer > VERSION => return Err(StoreErrorKind::NewerVersion.into()),
        _ => return Err(Unopened::NotSealed.into()),
    }
    let key = rest.get_u32_le();
    let nonce: [u8; NONCE] = take(&mut rest);
    let text = rest.split_to(rest.len() - TAG);
    let tag: [u8; TAG] = take(&mut rest);
    let key = ring.find(key).ok_or(Unopened::UnknownKey(key))?;
    let mut plain = text.to_vec();
    let bound = bound(sealed.is_kept(), key.id, id);
    key.cipher
        .decrypt_inout_detached(
            &Nonce::from(nonce),
            &bound,
            plain.as_mut_slice().into(),
            &Tag::from(tag),
        )
        .map_err(|_| Unopened::DoesNotFit(key.id))?;
    StoredResponse::from_bytes(plain.into())
}

fn bound(is_kept: bool, key: u32, id: &RecordId) -> [u8; 38] {
    let mut bound = [0; 38];
    bound[0] = VERSION;
    bound[1] = u8::from(is_kept);
    bound[2..6].copy_from_slice(&key.to_le_bytes());
    bound[6..].copy_from_slice(id.as_bytes());
    bound
}

fn take<const N: usize>(rest: &mut Bytes) -> [u8; N] {
    let mut bytes = [0; N];
    rest.copy_to_slice(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::error::Error;

    use http::{HeaderMap, HeaderValue, StatusCode};

    use super::*;
    use crate::store::encrypted::SecretKey;

    fn key(byte: u8) -> SecretKey {
        SecretKey::from_bytes([byte; 32])
    }

    fn id(byte: u8) -> RecordId {
        RecordId::from_bytes([byte; 32])
    }

    fn answer() -> StoredResponse {
        let mut headers = HeaderMap::new();
        headers.insert("x-card", HeaderValue::from_static("4242"));
        StoredResponse::encode(StatusCode::CREATED, &headers, |_| true, b"paid", None)
    }

    fn reason(result: Result<StoredResponse, StoreError>) -> Unopened {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Corrupt);
        *error.source().unwrap().downcast_ref().unwrap()
    }

    /// Version 1 as it was first released, made by another library. These bytes are in stores: they never change.
    const GOLDEN: &str = "0100c800000000000000000049000000000000000101020304090909090909090909090909d5eaffb756a2a7a5f95aa9\
        3e858bdc104fc3045c769dd863447452321aff3c918501da5fecd7ee9c5921cb2607ed66824938d20de4e37ae5";

    #[test]
    fn version_1_is_written_and_read_as_it_was_first_released() {
        let ring = KeyRing::sealing(0x0403_0201, &key(7));
        let sealed = seal_with(ring.sealer(), &[9; NONCE], &id(3), &answer()).unwrap();
        let hex: String = sealed.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, GOLDEN);
        assert_eq!(open(&ring, &id(3), &sealed).unwrap(), answer());
    }

    #[test]
    fn what_is_sealed_is_opened_whatever_its_size() {
        let ring = KeyRing::sealing(1, &key(1));
        for length in [0, 1, 15, 16, 17, 100_000] {
            let body = vec![b'x'; length];
            let answer = StoredResponse::encode(StatusCode::OK, &HeaderMap::new(), |_| true, &body, None);
            let sealed = seal(&ring, &id(1), &answer).unwrap();
            assert_eq!(sealed.len(), answer.len() + 53, "the documented overhead");
            assert!(sealed.is_kept());
            assert_eq!(open(&ring, &id(1), &sealed).unwrap(), answer);
        }
        let fact = StoredResponse::not_kept(StatusCode::ACCEPTED);
        let sealed = seal(&ring, &id(1), &fact).unwrap();
        assert!(!sealed.is_kept(), "a store makes room for what is kept only");
        assert_ne!(sealed.status(), StatusCode::ACCEPTED);
        assert_eq!(open(&ring, &id(1), &sealed).unwrap(), fact);
    }

    #[test]
    fn the_same_answer_is_sealed_in_other_bytes_each_time() {
        let ring = KeyRing::sealing(1, &key(1));
        let [one, two] = [(); 2].map(|()| seal(&ring, &id(1), &answer()).unwrap());
        assert_ne!(one, two);
    }

    #[test]
    fn each_flipped_bit_of_a_sealed_answer_is_an_error() {
        let ring = KeyRing::sealing(1, &key(1)).opening(2, &key(2));
        for answer in [answer(), StoredResponse::not_kept(StatusCode::ACCEPTED)] {
            let sealed = seal(&ring, &id(1), &answer).unwrap();
            for bit in 0..sealed.len() * 8 {
                let mut bytes = sealed.as_bytes().to_vec();
                bytes[bit / 8] ^= 1 << (bit % 8);
                let opened = StoredResponse::from_bytes(bytes.into()).and_then(|sealed| open(&ring, &id(1), &sealed));
                let kind = opened.unwrap_err().kind();
                let expected = matches!(kind, StoreErrorKind::Corrupt | StoreErrorKind::NewerVersion);
                assert!(expected, "bit {bit}: {kind:?}");
            }
        }
    }

    #[test]
    fn a_sealed_answer_that_was_cut_or_is_none_is_an_error() {
        let ring = KeyRing::sealing(1, &key(1));
        let sealed = seal(&ring, &id(1), &answer()).unwrap();
        let body = sealed.opaque_body().unwrap().unwrap();
        for end in 0..body.len() {
            let mut cut = StoredResponse::opaque_head(true, end);
            cut.extend_from_slice(&body[..end]);
            let cut = StoredResponse::from_bytes(cut.into()).unwrap();
            let reason = reason(open(&ring, &id(1), &cut));
            assert!(
                matches!(reason, Unopened::NotSealed | Unopened::DoesNotFit(1)),
                "{reason}"
            );
        }
        for plain in [answer(), StoredResponse::not_kept(StatusCode::OK)] {
            assert_eq!(reason(open(&ring, &id(1), &plain)), Unopened::NotSealed);
        }
    }

    #[test]
    fn an_answer_of_another_record_does_not_open() {
        let ring = KeyRing::sealing(1, &key(1));
        let sealed = seal(&ring, &id(1), &answer()).unwrap();
        assert_eq!(reason(open(&ring, &id(2), &sealed)), Unopened::DoesNotFit(1));
    }

    #[test]
    fn whatever_ring_has_its_key_opens_an_answer_and_no_other() {
        let sealed = seal(&KeyRing::sealing(1, &key(1)), &id(1), &answer()).unwrap();
        let later = KeyRing::sealing(2, &key(2)).opening(3, &key(3)).opening(1, &key(1));
        assert_eq!(open(&later, &id(1), &sealed).unwrap(), answer());
        let dropped = KeyRing::sealing(2, &key(2)).opening(3, &key(3));
        assert_eq!(reason(open(&dropped, &id(1), &sealed)), Unopened::UnknownKey(1));
        let exchanged = KeyRing::sealing(2, &key(1)).opening(1, &key(2));
        assert_eq!(reason(open(&exchanged, &id(1), &sealed)), Unopened::DoesNotFit(1));
        // The id is bound, too: not even the right key opens it under another one.
        let mut bytes = sealed.as_bytes().to_vec();
        bytes[21] = 2;
        let renamed = StoredResponse::from_bytes(bytes.into()).unwrap();
        let reason = reason(open(&exchanged, &id(1), &renamed));
        assert_eq!(reason, Unopened::DoesNotFit(2));
    }

    #[test]
    fn a_newer_version_is_an_error_of_its_own() {
        let ring = KeyRing::sealing(1, &key(1));
        let sealed = seal(&ring, &id(1), &answer()).unwrap();
        let mut bytes = sealed.as_bytes().to_vec();
        bytes[20] = 2;
        let newer = StoredResponse::from_bytes(bytes.into()).unwrap();
        let kind = open(&ring, &id(1), &newer).unwrap_err().kind();
        assert_eq!(kind, StoreErrorKind::NewerVersion);
    }

    #[test]
    fn no_bytes_make_the_reader_panic() {
        use proptest::prelude::*;
        let ring = KeyRing::sealing(1, &key(1));
        proptest!(|(mut body in proptest::collection::vec(any::<u8>(), 0..80), known in any::<bool>())| {
            if known && body.len() > 5 {
                body[..5].copy_from_slice(&[1, 1, 0, 0, 0]);
            }
            let mut bytes = StoredResponse::opaque_head(true, body.len());
            bytes.extend_from_slice(&body);
            let sealed = StoredResponse::from_bytes(bytes.into()).unwrap();
            assert!(open(&ring, &id(1), &sealed).is_err());
        });
    }
}
