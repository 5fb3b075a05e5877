//! The matched route, which is the operation unless one is named.

use http::request::Parts;

use super::{ROUTE, id::IdHasher, sent_uri};

#[cfg(feature = "axum")]
pub(super) fn hash_into(id: &mut IdHasher, parts: &Parts) {
    match parts.extensions.get::<axum::extract::MatchedPath>() {
        Some(matched) => pattern(id, matched.as_str()),
        None => path(id, parts),
    }
}

#[cfg(not(feature = "axum"))]
pub(super) fn hash_into(id: &mut IdHasher, parts: &Parts) {
    path(id, parts);
}

fn path(id: &mut IdHasher, parts: &Parts) {
    id.field(ROUTE, sent_uri(&parts.extensions, &parts.uri).path().as_bytes());
}

/// Without the names of its parameters, which no client sees: a deploy that renames one would give the retries of what
/// was begun before it ids of their own. Each piece of the text says by its tag what stands before it.
#[cfg(feature = "axum")]
fn pattern(id: &mut IdHasher, pattern: &str) {
    let (mut tag, mut rest) = (ROUTE, pattern);
    while let Some((before, name, after)) = split_at_parameter(rest) {
        id.field(tag, before.as_bytes());
        tag = match name.starts_with('*') {
            true => super::AFTER_SEGMENTS,
            false => super::AFTER_SEGMENT,
        };
        rest = after;
    }
    id.field(tag, rest.as_bytes());
}

/// What stands before the first parameter, its name, and what stands behind it.
#[cfg(feature = "axum")]
fn split_at_parameter(pattern: &str) -> Option<(&str, &str, &str)> {
    let (before, rest) = split_at_brace(pattern, '{')?;
    let (name, after) = split_at_brace(rest, '}')?;
    Some((before, name, after))
}

/// At the first one that is not doubled: two of them stand for one of the text, in a name, too.
#[cfg(feature = "axum")]
fn split_at_brace(text: &str, brace: char) -> Option<(&str, &str)> {
    let mut from = 0;
    loop {
        let at = from + text.get(from..)?.find(brace)?;
        let after = text.get(at + 1..)?;
        if !after.starts_with(brace) {
            return Some((text.get(..at)?, after));
        }
        from = at + 2;
    }
}

#[cfg(all(test, feature = "axum"))]
mod tests {
    use super::*;
    use crate::record::RecordId;

    fn of(text: &str) -> RecordId {
        let mut id = IdHasher::new();
        pattern(&mut id, text);
        id.finish()
    }

    #[test]
    fn the_names_of_a_routes_parameters_count_for_nothing() {
        for (one, other) in [
            ("/orders/{id}/refunds", "/orders/{order_id}/refunds"),
            ("/{a}/{b}", "/{b}/{a}"),
            ("/files/{*rest}", "/files/{*path}"),
            ("/{a}}b}/c", "/{d}/c"),
            ("/{{x}}/{id}", "/{{x}}/{order}"),
            ("/x{{{id}", "/x{{{order}"),
        ] {
            assert_eq!(of(one), of(other), "{one} and {other}");
        }
    }

    #[test]
    fn two_routes_that_differ_in_anything_else_are_two_operations() {
        let routes = [
            "/orders",
            "/orders/",
            "/orders/{id}",
            "/orders/{id}/",
            "/orders/{*id}",
            "/orders/{{id}}",
            "/orders/{{other}}",
            "/orders/{id}/refunds",
            "/orders/{id}/refunds/{id}",
            "/orders/{id}/refunds/{*id}",
            "/orders/{id}/{refunds}",
            "/orders/{id}/{id}/{id}",
            "/orders/refunds/{id}",
            "/orders/x{{{id}",
            "/orders/x{{{{id}}",
            "/{id}/orders",
        ];
        for (at, one) in routes.iter().enumerate() {
            for other in routes.iter().skip(at + 1) {
                assert_ne!(of(one), of(other), "{one} and {other}");
            }
        }
    }

    #[test]
    fn a_route_without_parameters_is_hashed_as_the_path_that_it_is() {
        let mut id = IdHasher::new();
        id.field(ROUTE, b"/orders");
        assert_eq!(of("/orders"), id.finish());
    }
}
