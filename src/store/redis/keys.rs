//! The names of records on the server.

use crate::record::RecordId;

/// What all names begin with.
#[derive(Clone, Debug)]
pub(super) struct Keys(String);

const CHANGED: &str = "changed:";

impl Keys {
    pub(super) fn new(prefix: String) -> Self {
        Self(prefix)
    }

    /// One key holds all of a record.
    pub(super) fn key(&self, id: &RecordId) -> String {
        format!("{}{}", self.0, id.to_hex())
    }

    /// Where changes of a record are published.
    pub(super) fn channel(&self, id: &RecordId) -> String {
        format!("{}{CHANGED}{}", self.0, id.to_hex())
    }

    pub(super) fn id_of_channel(&self, channel: &str) -> Option<RecordId> {
        let hex = channel.strip_prefix(&self.0)?.strip_prefix(CHANGED)?;
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
    fn a_channel_names_its_record_and_no_other_text_does() {
        let keys = Keys::new("idempotency:".to_owned());
        let id = RecordId::from_bytes(std::array::from_fn(|at| at as u8 * 7));
        assert_eq!(keys.id_of_channel(&keys.channel(&id)), Some(id));
        for other in [
            keys.key(&id),
            "idempotency:changed:".to_owned(),
            format!("idempotency:changed:{}", "x".repeat(64)),
            format!("idempotency:changed:{}", "ä".repeat(32)),
        ] {
            assert_eq!(keys.id_of_channel(&other), None, "{other}");
        }
    }
}
