//! The names of records on the server.

use crate::{hex, record::RecordId};

/// What all names begin with.
#[derive(Clone, Debug)]
pub(super) struct Keys(String);

impl Keys {
    pub(super) fn new(prefix: String) -> Self {
        Self(prefix)
    }

    /// One key holds all of a record. Changes are published under the same name, so that they are where the record is.
    pub(super) fn key(&self, id: &RecordId) -> String {
        let mut key = String::with_capacity(self.0.len() + 64);
        key.push_str(&self.0);
        hex::push(&mut key, id.as_bytes());
        key
    }

    pub(super) fn id(&self, key: &str) -> Option<RecordId> {
        let hex = key.strip_prefix(&self.0)?;
        if hex.len() != 64 || !hex.is_ascii() {
            return None;
        }
        let mut bytes = [0; 32];
        for (byte, digits) in bytes.iter_mut().zip(hex.as_bytes().chunks(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
        }
        Some(RecordId::from_bytes(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_names_its_record_and_no_other_text_does() {
        let keys = Keys::new("idempotency:".to_owned());
        let id = RecordId::from_bytes(std::array::from_fn(|at| at as u8 * 7));
        assert_eq!(keys.key(&id), format!("idempotency:{}", id.to_hex()));
        assert_eq!(keys.id(&keys.key(&id)), Some(id));
        for other in [
            "idempotency:".to_owned(),
            format!("other:{}", id.to_hex()),
            format!("idempotency:{}", "x".repeat(64)),
            format!("idempotency:{}", "ä".repeat(32)),
        ] {
            assert_eq!(keys.id(&other), None, "{other}");
        }
    }
}
