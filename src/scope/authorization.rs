//! Credentials that carry parameters: `Scheme name=value, name="value"`.

use http::HeaderValue;

/// The parameters of an `Authorization` header (RFC 9110 §11.4) whose scheme this is. Names and values are borrowed as
/// they are sent; a quoted value is without its quotes.
///
/// `None` for another scheme. `Some(None)` for the right scheme with parameters that cannot be read.
///
/// Values that are not quoted may have any characters but commas, quotes and white space: signatures are often sent as
/// bare Base64, which a strict reader refuses.
pub(super) fn parameters<'h>(value: &'h HeaderValue, scheme: &str) -> Option<Option<Vec<(&'h str, &'h str)>>> {
    let Ok(text) = value.to_str() else {
        let is_scheme = value.as_bytes().get(..scheme.len());
        return is_scheme
            .is_some_and(|start| start.eq_ignore_ascii_case(scheme.as_bytes()))
            .then_some(None);
    };
    let (found, rest) = text.trim().split_once([' ', '\t']).unwrap_or((text.trim(), ""));
    found.eq_ignore_ascii_case(scheme).then(|| read(rest))
}

fn read(mut rest: &str) -> Option<Vec<(&str, &str)>> {
    let mut parameters = Vec::new();
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        if rest.is_empty() {
            return Some(parameters);
        }
        let (name, after) = rest.split_once('=')?;
        let name = name.trim();
        if name.is_empty()
            || !name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
        {
            return None;
        }
        let after = after.trim_start();
        let (value, after) = match after.strip_prefix('"') {
            // An escape in a quoted value has no use here, and two readers might read it in two ways.
            Some(quoted) => quoted.split_once('"').filter(|(value, _)| !value.contains('\\'))?,
            None => {
                let end = after.find([',', ' ', '\t']).unwrap_or(after.len());
                let (value, after) = after.split_at(end);
                if value.contains('"') {
                    return None;
                }
                (value, after)
            }
        };
        parameters.push((name, value));
        rest = after.trim_start();
        if !rest.is_empty() && !rest.starts_with(',') {
            return None;
        }
    }
}

/// The value of the parameter, if it is there once and is not empty.
pub(super) fn only<'h>(parameters: &[(&'h str, &'h str)], name: &str) -> Option<&'h str> {
    let mut values = parameters.iter().filter(|(found, _)| found.eq_ignore_ascii_case(name));
    match (values.next(), values.next()) {
        (Some((_, value)), None) if !value.is_empty() => Some(value),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const SCHEME: &str = "TXGW-SHA256-RSA2048";

    fn auth_id(header: &'static str) -> Option<Option<&'static str>> {
        let header: &'static HeaderValue = Box::leak(Box::new(HeaderValue::from_static(header)));
        let found = parameters(header, SCHEME)?;
        Some(found.and_then(|parameters| only(&parameters, "auth_id")))
    }

    #[test]
    fn a_parameter_is_found_quoted_or_bare_wherever_it_stands() {
        for header in [
            r#"TXGW-SHA256-RSA2048 auth_id="m1",auth_id_type=MERCHANT_ID,nonce_str="a,b",signature=ab+/=="#,
            r#"txgw-sha256-rsa2048  nonce_str=n , auth_id=m1"#,
            r#"TXGW-SHA256-RSA2048 nonce_str="auth_id=m2",auth_id=m1"#,
        ] {
            assert_eq!(auth_id(header), Some(Some("m1")), "{header}");
        }
    }

    #[test]
    fn what_is_not_clear_names_nobody() {
        for header in [
            "TXGW-SHA256-RSA2048",
            "TXGW-SHA256-RSA2048 nonsense",
            "TXGW-SHA256-RSA2048 a b=1,auth_id=m1",
            "TXGW-SHA256-RSA2048 =1,auth_id=m1",
            r#"TXGW-SHA256-RSA2048 auth_id="""#,
            r#"TXGW-SHA256-RSA2048 auth_id="m1",auth_id="m2""#,
            r#"TXGW-SHA256-RSA2048 auth_id="m1",AUTH_ID="m1""#,
            r#"TXGW-SHA256-RSA2048 auth_id="m1" auth_id_type=X"#,
            r#"TXGW-SHA256-RSA2048 nonce_str="a",auth_id="m1"#,
            r#"TXGW-SHA256-RSA2048 auth_id="m\1""#,
            r#"TXGW-SHA256-RSA2048 auth_id=m"1""#,
            r#"TXGW-SHA256-RSA2048 nonce_str="auth_id=m1""#,
        ] {
            assert_eq!(auth_id(header), Some(None), "{header}");
        }
    }

    #[test]
    fn another_scheme_is_left_to_others() {
        assert_eq!(auth_id("Bearer abc"), None);
        assert_eq!(auth_id("TXGW auth_id=m1"), None);
        assert_eq!(auth_id(""), None);
        assert_eq!(
            parameters(&HeaderValue::from_bytes(b"Bearer \xff").unwrap(), SCHEME),
            None
        );
        let garbled = HeaderValue::from_bytes(b"TXGW-SHA256-RSA2048 auth_id=\xff").unwrap();
        assert_eq!(parameters(&garbled, SCHEME), Some(None));
    }
}
