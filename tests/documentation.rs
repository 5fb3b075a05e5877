//! The page on providers says what the presets are.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{collections::BTreeSet, fs, time::Duration};

use http::{Method, StatusCode};
use tower_idempotency::{
    Concurrent, Guarantee, IdempotencyLayer, MemoryStore, Profile, RejectionKind, Statuses, WithoutKey,
};

const PAGE: &str = include_str!("../docs/providers.md");

type Preset = fn() -> Profile;

const PRESETS: [(&str, Preset); 12] = [
    ("checkbook", Profile::checkbook),
    ("pockyt", Profile::pockyt),
    ("midaspay", Profile::midaspay),
    ("doku", Profile::doku),
    ("stripe", Profile::stripe),
    ("adyen", Profile::adyen),
    ("paypal", Profile::paypal),
    ("square", Profile::square),
    ("gocardless", Profile::gocardless),
    ("oasis_repeatable_requests", Profile::oasis_repeatable_requests),
    ("aip_155", Profile::aip_155),
    ("svix", Profile::svix),
];

/// A layer's settings, as its `Debug` shows them.
fn settings(layer: &IdempotencyLayer) -> String {
    format!("{layer:?}")
}

fn of(preset: Preset) -> String {
    settings(&IdempotencyLayer::new(MemoryStore::new()).profile(preset()))
}

/// The value of the layer's own field of this name, before those of its routes.
fn field<'s>(settings: &'s str, name: &str) -> &'s str {
    let (_, value) = settings
        .split_once(&format!(" {name}: "))
        .unwrap_or_else(|| panic!("{settings} has no {name}"));
    let mut depth = 0;
    let end = value.find(|c| {
        match c {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth -= 1,
            _ => {}
        }
        depth < 0 || (depth == 0 && c == ',')
    });
    &value[..end.expect("a field ends")]
}

/// The cells of one column of one table, by preset.
fn column(heading: &str) -> Vec<(&'static str, &'static str)> {
    let cells = |line: &'static str| line.trim_matches('|').split('|').map(str::trim);
    let mut lines = PAGE.lines();
    let at = lines
        .by_ref()
        .filter(|line| line.starts_with("| preset |"))
        .find_map(|head| cells(head).position(|cell| cell == heading))
        .unwrap_or_else(|| panic!("no table has a column {heading:?}"));
    let rows = lines.skip(1).take_while(|line| line.starts_with('|'));
    rows.map(|row| (preset_of(cells(row).next().unwrap()), cells(row).nth(at).unwrap()))
        .collect()
}

fn preset_of(cell: &str) -> &str {
    let name = cell
        .strip_prefix("`Profile::")
        .and_then(|rest| rest.strip_suffix("()`"));
    name.unwrap_or_else(|| panic!("{cell:?} is not a preset"))
}

/// Stars within backquotes belong to names.
fn without_italics(cell: &str) -> String {
    let parts = cell.split('`').enumerate();
    let parts: Vec<_> = parts
        .map(|(at, part)| {
            if at % 2 == 1 {
                part.to_owned()
            } else {
                part.replace('*', "")
            }
        })
        .collect();
    parts.join("`")
}

/// Compares a column with a setting: `said` makes of a cell what the settings should say, and of the settings what they
/// do say.
#[track_caller]
fn compare(heading: &str, said: impl Fn(&str) -> String, is: impl Fn(&str) -> String) {
    for ((name, cell), (_, preset)) in column(heading).into_iter().zip(PRESETS) {
        assert_eq!(
            said(&without_italics(cell)),
            is(&of(preset)),
            "{heading} of {name}: {cell}"
        );
    }
}

#[test]
fn every_preset_is_in_both_tables_and_has_a_section() {
    let mut constructors = BTreeSet::new();
    for file in fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/src/profile")).unwrap() {
        let source = fs::read_to_string(file.unwrap().path()).unwrap();
        for (line, _) in source
            .lines()
            .filter_map(|line| line.trim().strip_prefix("pub fn ")?.split_once("() -> Self"))
        {
            constructors.insert(line.to_owned());
        }
    }
    let presets: Vec<_> = PRESETS.iter().map(|(name, _)| *name).collect();
    assert_eq!(
        constructors,
        presets.iter().map(|name| (*name).to_owned()).collect(),
        "this test knows them all"
    );
    for heading in ["the key", "kept for"] {
        let rows: Vec<_> = column(heading).into_iter().map(|(name, _)| name).collect();
        assert_eq!(rows, presets);
    }
    for (name, preset) in PRESETS {
        let section = format!("\n### {}\n", preset().name());
        assert!(PAGE.contains(&section), "{name} has no section");
    }
}

#[test]
fn the_page_says_how_long_each_preset_keeps_its_answers() {
    compare(
        "kept for",
        |cell| {
            let words: Vec<_> = cell.split([' ', ',']).collect();
            let mut spans: BTreeSet<_> = words
                .windows(2)
                .filter_map(|pair| Some(pair[0].parse::<u64>().ok()? * seconds(pair[1])?))
                .map(|seconds| format!("{:?}", Duration::from_secs(seconds)))
                .collect();
            if cell == "for ever" {
                spans.insert("Forever".to_owned());
            }
            format!("{spans:?}")
        },
        |settings| {
            let spans = settings.split(" retention: ").skip(1).map(|rest| {
                let span = rest.split_once(", lease").unwrap().0;
                span.trim_start_matches("For(").trim_end_matches(')').to_owned()
            });
            let mut spans: BTreeSet<_> = spans.collect();
            // A clock that is ahead makes records live for longer.
            if let Some((_, ahead)) = field(settings, "first_sent").rsplit_once(", ") {
                spans.insert(ahead.trim_end_matches(')').to_owned());
            }
            format!("{spans:?}")
        },
    );
}

fn seconds(unit: &str) -> Option<u64> {
    match unit {
        "min" => Some(60),
        "h" => Some(60 * 60),
        "d" => Some(24 * 60 * 60),
        _ => None,
    }
}

#[test]
fn the_page_says_how_long_a_key_may_be() {
    let said = |cell: &str| match cell {
        "no limit" => usize::MAX.to_string(),
        number => number.to_owned(),
    };
    compare("characters at most", said, |settings| {
        field(settings, "max_length").to_owned()
    });
}

#[test]
fn the_page_says_which_requests_are_covered() {
    let methods = |settings: &str| field(settings, "methods").trim_matches(['[', ']']).to_owned();
    compare("methods", str::to_owned, methods);
    let said = |cell: &str| {
        let routes: BTreeSet<_> = cell.split('`').filter(|part| part.starts_with('/')).collect();
        format!("{routes:?}")
    };
    compare("routes with settings", said, |settings| {
        let mut parts = settings.split(": Policy {").skip(1);
        let mut routes = BTreeSet::new();
        // The name of each route ends what is said of the one before it.
        while let Some(quoted) = parts.next().and_then(|part| part.strip_suffix('"')) {
            routes.insert(quoted.rsplit_once('"').unwrap().1);
        }
        format!("{routes:?}")
    });
}

#[test]
fn the_page_says_where_the_key_is_and_whose_it_is() {
    // Every name in the settings stands in the cell.
    for (heading, setting) in [("the key", "key"), ("the key", "first_sent"), ("scope", "scope")] {
        for ((name, cell), (_, preset)) in column(heading).into_iter().zip(PRESETS) {
            let settings = of(preset);
            for (at, quoted) in field(&settings, setting).split('"').enumerate() {
                let is_name = at % 2 == 1;
                let cell = cell.to_lowercase();
                assert!(
                    !is_name || cell.contains(&quoted.to_lowercase()),
                    "{heading} of {name}: no {quoted}"
                );
            }
        }
    }
}

#[test]
fn the_page_says_what_happens_without_a_key() {
    let said = |cell: &str| {
        let what = match cell.split([' ', ',']).next().unwrap() {
            "passes" => WithoutKey::Pass,
            "refused" => WithoutKey::Refuse,
            "derived" => WithoutKey::DeriveAndRefuse,
            other => panic!("{other}"),
        };
        format!("{what:?}")
    };
    compare("without a key", said, |settings| {
        field(settings, "without_key").to_owned()
    });
}

#[test]
fn the_page_says_which_answers_are_kept() {
    let said = |cell: &str| {
        let statuses = match cell {
            "success" => Statuses::success(),
            "all" => Statuses::all(),
            "all but 5xx" => Statuses::all().without_class(5),
            list => {
                let but = list.split([' ', ',']).filter_map(|word| word.parse().ok());
                let but = but.filter_map(|status| StatusCode::from_u16(status).ok());
                assert!(list.starts_with("the list"), "{list}");
                Statuses::default().without(but)
            }
        };
        format!("{statuses:?}")
    };
    compare("answers kept", said, |settings| {
        field(settings, "store_when").to_owned()
    });
}

#[test]
fn the_page_says_what_a_replay_is() {
    let said = |cell: &str| {
        let replay = match cell {
            cell if cell.contains("the first answer with status 409") => "WithStatus(409)",
            cell if cell.starts_with("the first answer") => "AsFirst",
            _ => "Rewritten(..)",
        };
        let marker = !cell.contains("without a marker");
        let names: Vec<_> = ["idempotency-key", "repeatability-result"]
            .into_iter()
            .filter(|name| cell.to_lowercase().contains(name))
            .collect();
        format!("{replay}, {marker}, {names:?}")
    };
    compare("a replay is", said, |settings| {
        let replay = field(settings, "replay");
        let marker = field(settings, "replay_marker") != "None";
        let added = [field(settings, "echo_key"), field(settings, "answer_headers")].concat();
        let names: Vec<_> = added.split('"').skip(1).step_by(2).collect();
        format!("{replay}, {marker}, {names:?}")
    });
}

#[test]
fn the_page_says_how_another_body_and_a_duplicate_in_flight_are_answered() {
    for (heading, kind) in [
        ("another body", RejectionKind::KeyReused),
        ("in flight", RejectionKind::InProgress),
    ] {
        let said = |cell: &str| {
            let status = cell.split([' ', ',']).find_map(|word| word.parse::<u16>().ok());
            // The wait's seconds are no status.
            let status = if cell.starts_with("waits") { Some(409) } else { status };
            status.expect("a status").to_string()
        };
        compare(heading, said, |settings| {
            let set = field(settings, "statuses").split_once(&format!("({kind:?}, "));
            let set = set.and_then(|(_, rest)| rest.split(')').next());
            set.map_or_else(|| kind.default_status().as_u16().to_string(), str::to_owned)
        });
    }
    let said = |cell: &str| {
        let waits = cell
            .strip_prefix("waits ")
            .map(|rest| rest.split(' ').next().unwrap().parse().unwrap());
        let what = waits.map_or(Concurrent::Refuse, |seconds| {
            Concurrent::Wait(Duration::from_secs(seconds))
        });
        format!("{what:?}")
    };
    compare("in flight", said, |settings| field(settings, "concurrent").to_owned());
}

#[test]
fn the_page_says_each_guarantee() {
    let said = |cell: &str| {
        let guarantee = match cell {
            "at most once" => Guarantee::AtMostOnce,
            "at least once" => Guarantee::AtLeastOnce,
            other => panic!("{other}"),
        };
        format!("{guarantee:?}")
    };
    compare("guarantee", said, |settings| field(settings, "guarantee").to_owned());
}

#[test]
fn what_is_in_italics_is_the_layers_own_setting_and_nothing_else_is() {
    // A layer on which nothing is as any preset has it.
    let odd = || {
        IdempotencyLayer::new(MemoryStore::new())
            .methods([Method::TRACE])
            .max_key_length(7)
            .without_key(WithoutKey::DeriveAndReplay)
            .scope_headers(["x-odd"])
            .retention(Duration::from_secs(7))
            .store_statuses(Statuses::none())
            .replay_status(StatusCode::IM_A_TEAPOT)
            .rejection_status(RejectionKind::KeyReused, StatusCode::IM_A_TEAPOT)
            .on_concurrent(Concurrent::Wait(Duration::from_secs(7)))
    };
    let layers_own = settings(&odd());
    for (heading, setting) in [
        ("methods", "methods"),
        ("characters at most", "max_length"),
        ("without a key", "without_key"),
        ("scope", "tenant"),
        ("kept for", "retention"),
        ("answers kept", "store_when"),
        ("a replay is", "replay"),
        ("another body", "statuses"),
        ("in flight", "concurrent"),
    ] {
        for ((name, cell), (_, preset)) in column(heading).into_iter().zip(PRESETS) {
            let is_left_alone = match setting {
                "statuses" => settings(&odd().profile(preset())).contains("(KeyReused, 418)"),
                _ => field(&settings(&odd().profile(preset())), setting) == field(&layers_own, setting),
            };
            assert_eq!(cell.starts_with('*'), is_left_alone, "{heading} of {name}: {cell}");
        }
    }
    for ((name, cell), (_, preset)) in column("guarantee").into_iter().zip(PRESETS) {
        let is_left_alone = [Guarantee::AtMostOnce, Guarantee::AtLeastOnce].into_iter().all(|own| {
            let layer = IdempotencyLayer::new(MemoryStore::new()).guarantee(own);
            field(&settings(&layer.profile(preset())), "guarantee") == format!("{own:?}")
        });
        assert_eq!(cell.starts_with('*'), is_left_alone, "guarantee of {name}: {cell}");
    }
}

#[test]
fn every_refusal_is_in_the_table_for_clients_with_its_status() {
    let (_, table) = PAGE.split_once("## What a client should do").unwrap();
    for kind in RejectionKind::ALL {
        let row = table
            .lines()
            .find(|line| line.starts_with("| `") && line.contains(&format!("`{}`", kind.slug())));
        let row = row.unwrap_or_else(|| panic!("{} is not in the table", kind.slug()));
        let status = row.split('|').nth(2).unwrap().trim();
        assert_eq!(status, kind.default_status().as_u16().to_string(), "{}", kind.slug());
    }
}

#[test]
fn the_profile_on_the_page_is_that_of_the_example() {
    let example = include_str!("../examples/provider.rs");
    let (_, profile) = example.split_once("/// The form of Quayside's errors.").unwrap();
    let (profile, _) = profile.split_once("#[derive(Deserialize)]").unwrap();
    assert!(PAGE.contains(profile.trim()), "the page has another profile");
}
