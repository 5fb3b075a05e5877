//! The page on reliability names tests that are there, and leaves no case out.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{collections::BTreeSet, fs, path::Path};

const PAGE: &str = include_str!("../docs/reliability.md");

/// The last case of the catalogue, and the numbers that it does not use.
const CASES: u32 = 126;
const UNUSED: [u32; 3] = [58, 60, 74];

fn rows() -> impl Iterator<Item = Vec<&'static str>> {
    let cases = PAGE.split_once("## Case by case").expect("the heading is there").1;
    let rows = cases
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| #"));
    rows.map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
}

/// `path::name`, without the ending of the path.
fn named(text: &str) -> impl Iterator<Item = (&str, &str)> {
    let quoted = text.split('`').skip(1).step_by(2);
    quoted.filter_map(|quoted| quoted.split_once("::"))
}

#[test]
fn every_test_that_the_page_names_is_there() {
    let mut count = 0;
    for (path, name) in named(PAGE) {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(path).with_extension("rs");
        let text = fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        assert!(text.contains(&format!("fn {name}(")), "{path} has no test {name}");
        count += 1;
    }
    assert!(count > 100, "only {count} tests are named");
}

#[test]
fn every_case_has_a_test_or_says_why_not() {
    let mut cases = BTreeSet::new();
    for row in rows() {
        let [numbers, case, tests] = row[..] else {
            panic!("not a row: {row:?}");
        };
        let (first, last) = numbers.split_once('-').unwrap_or((numbers, numbers));
        let number = |text: &str| text.parse::<u32>().unwrap_or_else(|error| panic!("{text:?}: {error}"));
        cases.extend(number(first)..=number(last));
        assert!(!case.is_empty());
        let is_untried = PAGE.contains(&format!("({first}, {last})"));
        assert!(named(tests).next().is_some() || is_untried, "{numbers}: {tests}");
    }
    let expected: BTreeSet<_> = (1..=CASES).filter(|case| !UNUSED.contains(case)).collect();
    assert_eq!(cases, expected);
}
