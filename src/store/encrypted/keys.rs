//! What an encrypted store is opened with.

use std::{error::Error, fmt, str::FromStr};

use aes_gcm_siv::{Aes256GcmSiv, KeyInit};
use zeroize::Zeroizing;

/// 32 secret bytes. No `Debug` and no error shows them, and they are overwritten when they are dropped.
///
/// They have to be random, as from `openssl rand -hex 32`; a password is not enough. As text they are 64 hexadecimal
/// digits, white space around them aside:
///
/// ```
/// # use tower_idempotency::SecretKey;
/// # let text = "00".repeat(32);
/// let key: SecretKey = text.parse()?;
/// # Ok::<(), tower_idempotency::InvalidSecretKey>(())
/// ```
#[derive(Clone)]
pub struct SecretKey(Zeroizing<[u8; 32]>);

/// A text that is not 64 hexadecimal digits. It is not repeated here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct InvalidSecretKey;

impl SecretKey {
    /// A key of these bytes.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    pub(super) fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl FromStr for SecretKey {
    type Err = InvalidSecretKey;

    fn from_str(text: &str) -> Result<Self, InvalidSecretKey> {
        let digits = text.trim().as_bytes();
        if digits.len() != 64 {
            return Err(InvalidSecretKey);
        }
        let digit = |at: usize| char::from(digits[at]).to_digit(16).ok_or(InvalidSecretKey);
        let mut bytes = Zeroizing::new([0; 32]);
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = (digit(2 * at)? << 4 | digit(2 * at + 1)?) as u8;
        }
        Ok(Self(bytes))
    }
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretKey(..)")
    }
}

impl fmt::Display for InvalidSecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a secret key is 64 hexadecimal digits")
    }
}

impl Error for InvalidSecretKey {}

/// The keys of stored answers: one that seals, and any number of others that only open what was sealed with them before.
///
/// Each has an id, a number of the user's choice, which is stored with every answer that it seals. An id names one key
/// for ever: another key under the id of an old one opens nothing that the old one sealed.
///
/// ```
/// use tower_idempotency::{KeyRing, SecretKey};
///
/// # let [new, old] = [1, 2].map(|byte| SecretKey::from_bytes([byte; 32]));
/// let keys = KeyRing::sealing(2, &new).opening(1, &old);
/// ```
#[derive(Clone)]
#[must_use]
pub struct KeyRing {
    sealer: Key,
    openers: Vec<Key>,
}

#[derive(Clone)]
pub(super) struct Key {
    pub(super) id: u32,
    pub(super) cipher: Aes256GcmSiv,
}

impl Key {
    fn new(id: u32, key: &SecretKey) -> Self {
        let cipher = Aes256GcmSiv::new(key.as_bytes().into());
        Self { id, cipher }
    }
}

impl KeyRing {
    /// A ring with one key, which seals and opens.
    pub fn sealing(id: u32, key: &SecretKey) -> Self {
        Self {
            sealer: Key::new(id, key),
            openers: Vec::new(),
        }
    }

    /// The same ring with one more key, which only opens.
    ///
    /// # Panics
    /// If there is a key with this id already.
    pub fn opening(mut self, id: u32, key: &SecretKey) -> Self {
        assert!(self.find(id).is_none(), "the key ring has a key {id} already");
        self.openers.push(Key::new(id, key));
        self
    }

    pub(super) fn sealer(&self) -> &Key {
        &self.sealer
    }

    pub(super) fn find(&self, id: u32) -> Option<&Key> {
        [&self.sealer].into_iter().chain(&self.openers).find(|key| key.id == id)
    }
}

impl fmt::Debug for KeyRing {
    /// The ids alone.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let openers: Vec<_> = self.openers.iter().map(|key| key.id).collect();
        f.debug_struct("KeyRing")
            .field("sealing", &self.sealer.id)
            .field("opening", &openers)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_key_is_read_from_64_hexadecimal_digits_and_nothing_else() {
        let text = "000102030405060708090a0b0c0d0e0f101112131415161718191A1B1C1D1E1F";
        let bytes: [u8; 32] = std::array::from_fn(|at| at as u8);
        for text in [text.to_owned(), format!(" {text}\n")] {
            assert_eq!(text.parse::<SecretKey>().unwrap().as_bytes(), &bytes);
        }
        let longer = format!("{text}00");
        for text in [
            "",
            &text[1..],
            &text[2..],
            &longer,
            &text.replace('A', "g"),
            &text.replace("00", "é"),
        ] {
            let error = text.parse::<SecretKey>().unwrap_err();
            assert_eq!(error.to_string(), "a secret key is 64 hexadecimal digits", "{text}");
        }
    }

    #[test]
    fn debug_shows_ids_and_no_key() {
        let key = SecretKey::from_bytes([0xab; 32]);
        let ring = KeyRing::sealing(7, &key).opening(6, &key);
        assert_eq!(format!("{key:?}"), "SecretKey(..)");
        assert_eq!(format!("{ring:?}"), "KeyRing { sealing: 7, opening: [6] }");
    }

    #[test]
    #[should_panic(expected = "the key ring has a key 7 already")]
    fn no_two_keys_have_one_id() {
        let key = SecretKey::from_bytes([1; 32]);
        let _ = KeyRing::sealing(7, &key).opening(7, &key);
    }
}
