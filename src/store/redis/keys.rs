//! The names of records on the server.

use std::io::Write;

use redis::{RedisWrite, ToRedisArgs, ToSingleRedisArg};

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

    /// The channel that this process listens to while it listens to any record's, so that one question tells whether there
    /// are listeners at all. Nothing is published there.
    pub(super) fn listening(&self) -> String {
        format!("{}listening", self.0)
    }

    /// The same as [`key`](Self::key), to be written into a command.
    pub(super) fn of<'a>(&'a self, id: &'a RecordId) -> Key<'a> {
        Key { prefix: &self.0, id }
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

/// The name of a record, which is not put together before it stands in a command.
#[derive(Clone, Copy)]
pub(super) struct Key<'a> {
    prefix: &'a str,
    id: &'a RecordId,
}

impl Key<'_> {
    pub(super) fn len(&self) -> usize {
        self.prefix.len() + 64
    }
}

impl ToRedisArgs for Key<'_> {
    fn write_redis_args<W: ?Sized + RedisWrite>(&self, out: &mut W) {
        let digits = hex::digits(self.id.as_bytes());
        let mut key = out.writer_for_next_arg();
        for part in [self.prefix.as_bytes(), digits.as_flattened()] {
            // What is written to is in memory.
            let _ = key.write_all(part);
        }
    }
}

impl ToSingleRedisArg for Key<'_> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_names_its_record_and_no_other_text_does() {
        let keys = Keys::new("idempotency:".to_owned());
        let id = RecordId::from_bytes(std::array::from_fn(|at| at as u8 * 7));
        assert_eq!(keys.key(&id), format!("idempotency:{}", id.to_hex()));
        assert_eq!(keys.id(&keys.key(&id)), Some(id));
        assert_eq!(keys.of(&id).to_redis_args(), [keys.key(&id).as_bytes()]);
        assert_eq!(keys.of(&id).len(), keys.key(&id).len());
        for other in [
            "idempotency:".to_owned(),
            format!("other:{}", id.to_hex()),
            format!("idempotency:{}", "x".repeat(64)),
            keys.listening(),
            format!("idempotency:{}", "ä".repeat(32)),
        ] {
            assert_eq!(keys.id(&other), None, "{other}");
        }
    }
}
