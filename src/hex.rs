//! Bytes as lower-case hexadecimal digits, two for each.

const DIGITS: &[u8; 16] = b"0123456789abcdef";

pub(crate) fn push(out: &mut String, bytes: &[u8]) {
    out.reserve(2 * bytes.len());
    for byte in bytes {
        out.extend(pair(*byte).map(char::from));
    }
}

#[cfg(feature = "redis")]
pub(crate) fn digits<const N: usize>(bytes: &[u8; N]) -> [[u8; 2]; N] {
    bytes.map(pair)
}

fn pair(byte: u8) -> [u8; 2] {
    [DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]
}

pub(crate) fn of(bytes: &[u8]) -> String {
    let mut hex = String::new();
    push(&mut hex, bytes);
    hex
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_byte_has_its_two_digits_in_order() {
        assert_eq!(super::of(&[0x00, 0x0f, 0xf0, 0x9a, 0xbc, 0xff]), "000ff09abcff");
        assert_eq!(super::of(&[]), "");
    }
}
