//! Statements with their values written into them, where they are sent as one text.
//!
//! The values are numbers, and bytes as hexadecimal digits.

use std::{fmt::Write, sync::Arc};

use super::say::{Say, Statement, Value};
use crate::hex;

/// One text of all of it.
pub(super) fn text(flight: &[Say]) -> String {
    let mut text = String::new();
    for say in flight {
        match say {
            Say::Plain(sql) => text.push_str(sql),
            Say::Ask(statement, values) => write_with_values(&mut text, &statement.sql, values),
        }
        text.push(';');
    }
    text
}

/// The same, by names of the statements that have values.
pub(super) fn text_of_names(flight: &[Say]) -> String {
    let mut text = String::new();
    for say in flight {
        match say {
            Say::Plain(sql) => text.push_str(sql),
            Say::Ask(statement, values) if values.is_empty() => text.push_str(&statement.sql),
            Say::Ask(statement, values) => {
                text.push_str("EXECUTE ");
                text.push_str(&statement.name);
                text.push('(');
                write_list(&mut text, values, write_value);
                text.push(')');
            }
        }
        text.push(';');
    }
    text
}

/// What makes the names of these known that are not `there`.
pub(super) fn text_to_prepare(named: &[&Arc<Statement>], there: Vec<String>) -> String {
    let mut text = String::new();
    for Statement { name, sql } in named.iter().map(|statement| &***statement) {
        if !there.contains(name) {
            // Writing to a string does not fail.
            let _ = write!(text, "PREPARE {name} AS {sql};");
        }
    }
    text
}

fn write_list<T>(text: &mut String, list: &[T], write: fn(&mut String, &T)) {
    for (index, one) in list.iter().enumerate() {
        if index > 0 {
            text.push(',');
        }
        write(text, one);
    }
}

/// The statement with its values in the places of `$1` and so on; not within quotes, where a table's name stands.
fn write_with_values(text: &mut String, sql: &str, values: &[Value]) {
    let mut quoted = None;
    let mut rest = sql.chars().peekable();
    while let Some(character) = rest.next() {
        match (quoted, character) {
            (None, '$') => {
                let mut number = 0;
                while let Some(digit) = rest.peek().and_then(|digit| digit.to_digit(10)) {
                    number = number * 10 + digit as usize;
                    rest.next();
                }
                if let Some(value) = values.get(number.wrapping_sub(1)) {
                    write_value(text, value);
                }
                continue;
            }
            (None, '"' | '\'') => quoted = Some(character),
            (Some(quote), _) if quote == character => quoted = None,
            _ => {}
        }
        text.push(character);
    }
}

fn write_value(text: &mut String, value: &Value) {
    // Writing to a string does not fail.
    let _ = match value {
        // Of the type that the statement says: to say it twice costs the server.
        Value::Bytes(bytes) => {
            write_bytes(text, bytes);
            Ok(())
        }
        Value::BytesList(list) => {
            text.push_str("ARRAY[");
            write_list(text, list, |text, bytes| {
                write_bytes(text, bytes);
                text.push_str("::bytea");
            });
            text.push(']');
            Ok(())
        }
        // In parentheses: a cast binds closer than a minus.
        Value::Small(number) => write!(text, "({number})"),
        Value::Int(number) => write!(text, "({number})"),
        Value::Long(number) => write!(text, "({number})"),
        Value::IntList(list) => write!(text, "ARRAY{list:?}"),
        Value::Text(words) => write!(text, "E'{}'", words.replace('\\', "\\\\").replace('\'', "\\'")),
    };
}

/// With a backslash that means itself, whatever `standard_conforming_strings` says.
fn write_bytes(text: &mut String, bytes: &[u8]) {
    text.reserve(2 * bytes.len() + 20);
    text.push_str("E'\\\\x");
    hex::push(text, bytes);
    text.push('\'');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_stand_where_the_statement_has_their_numbers_and_nowhere_else() {
        let values = [
            Value::from(&[0, 171]),
            Value::from(-7_i64),
            Value::from("it's".to_owned()),
        ];
        let sql = r#"SELECT $2::bigint, $1::bytea, '$1', $3::text FROM "a$1"."b""$2""#;
        let expected = r#"SELECT (-7)::bigint, E'\\x00ab'::bytea, '$1', E'it\'s'::text FROM "a$1"."b""$2";"#;
        assert_eq!(text(&[Say::ask(&Statement::of(sql), values)]), expected);
    }

    #[test]
    fn what_has_values_is_said_by_its_name_which_is_told_once_and_is_another_for_another_text() {
        let (add, look) = (
            Statement::of("SELECT $1::bigint + 1"),
            Statement::of("SELECT $1::bigint"),
        );
        let alone = Statement::of("LOCK TABLE t");
        assert_ne!(add.name, look.name);
        assert_eq!(add.name, Statement::of("SELECT $1::bigint + 1").name);
        assert!(add.name.len() < 64, "the server cuts longer ones off");
        let flight = [
            Say::ask(&alone, []),
            Say::ask(&add, [7_i64.into()]),
            Say::Plain("SAVEPOINT s"),
            Say::ask(&add, [8_i64.into()]),
            Say::ask(&look, [9_i64.into()]),
        ];
        let said = format!(
            "LOCK TABLE t;EXECUTE {add}((7));SAVEPOINT s;EXECUTE {add}((8));EXECUTE {look}((9));",
            add = add.name,
            look = look.name
        );
        assert_eq!(text_of_names(&flight), said);
        let told = format!("PREPARE {} AS SELECT $1::bigint + 1;", add.name);
        assert_eq!(text_to_prepare(&[&add, &look], vec![look.name.clone()]), told);
        assert_eq!(
            text_to_prepare(&[&add, &look], vec![look.name.clone(), add.name.clone()]),
            ""
        );
    }

    #[test]
    fn lists_are_written_whole_and_the_tenth_value_is_not_the_first() {
        let lists = [
            Value::BytesList(vec![vec![1], vec![0xf2, 3], vec![]]),
            Value::IntList(vec![1, -2]),
            Value::from(-3_i16),
            Value::from(-4_i32),
        ];
        let filling = (5..13).map(|number| Value::from(10 * number));
        let sql = "SELECT $1, $2, $3, $4, $10, $12, '' || $13";
        let expected = "SELECT ARRAY[E'\\\\x01'::bytea,E'\\\\xf203'::bytea,E'\\\\x'::bytea], ARRAY[1, -2], (-3), (-4), (100), \
                        (120), '' || ;BEGIN;";
        let flight = [
            Say::ask(&Statement::of(sql), lists.into_iter().chain(filling)),
            Say::Plain("BEGIN"),
        ];
        assert_eq!(text(&flight), expected);
    }
}
