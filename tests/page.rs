//! The demo's page, used by a real browser with real clicks.

#![cfg(feature = "axum")]
#![allow(clippy::expect_used, clippy::panic, reason = "a test says what it expects")]

mod support;

use std::collections::BTreeSet;

use serde_json::{Value, json};
#[cfg(feature = "postgres")]
use support::postgres::Postgres;
use support::{browser::Browser, demo::Demo, http};

/// One browser for all of them, one after the other: a second one would only take the machine from the first.
#[tokio::test]
async fn the_page_shows_what_idempotency_does() {
    let browser = Browser::start().await;
    sending_again_with_the_same_key_shows_the_first_answer_as_a_replay(&Page::open(&browser).await).await;
    ten_at_once_have_one_effect(&Page::open(&browser).await).await;
    a_changed_amount_is_refused(&Page::open(&browser).await).await;
    hanging_up_loses_the_answer_but_not_the_work(&Page::open(&browser).await).await;
    a_new_key_is_a_second_effect(&Page::open(&browser).await).await;
    a_panic_leaves_an_unknown_outcome_that_is_never_run_again(&Page::open(&browser).await).await;
    every_operation_on_offer_works_and_is_protected(&Page::open(&browser).await).await;
    what_a_user_typed_stays_text(&Page::open(&browser).await).await;
    #[cfg(target_os = "linux")]
    {
        let demo = Demo::start(&["--ledger", "/dev/full"]);
        an_error_of_a_handler_is_no_refusal(&Page::of(&browser, demo).await).await;
    }
    without_a_database_there_are_no_accounts(&Page::open(&browser).await).await;
    #[cfg(feature = "postgres")]
    {
        let server = Postgres::start(&[]);
        let page = async || Page::of(&browser, Demo::start(&["--store", &server.url()])).await;
        a_transfer_is_seen_to_move_money_once_and_the_sum_stays(&page().await).await;
        a_transfer_that_panics_between_its_halves_is_seen_to_move_nothing(&page().await).await;
        a_sum_that_does_change_is_said(&page().await, &server).await;
    }
    assert_eq!(
        browser.complaints().await,
        [] as [Value; 0],
        "nothing in the page went wrong"
    );
}

async fn sending_again_with_the_same_key_shows_the_first_answer_as_a_replay(page: &Page<'_>) {
    let first = page.click_and_see("#send").await;
    first.must_be("first", 201);
    let again = page.click_and_see("#send-again").await;
    again.must_be("replayed", 201);
    assert!(again.text.contains("Replayed"), "{again:?}");
    assert!(again.text.contains("The handler did not run"), "{again:?}");
    assert!(
        first.id.is_some() && again.id == first.id,
        "the same answer: {first:?} {again:?}"
    );
    // The button that is not called "again" is as safe.
    let once_more = page.click_and_see("#send").await;
    once_more.must_be("replayed", 201);
    assert_eq!(page.effects(1).await, BTreeSet::from_iter(first.id));
    page.browser
        .until(
            "the outcome is announced with what it meant for the ledger",
            "return document.querySelector('#outcome[role=status]').innerText
                 === 'Replayed, 201. The handler did not run: this is the first one\\'s answer. The ledger: 1 effect.'",
            &[],
        )
        .await;
    page.browser
        .until("the page counts what it sent", "return reading.sent() === 3", &[])
        .await;
}

async fn ten_at_once_have_one_effect(page: &Page<'_>) {
    page.browser.click("#send-ten").await;
    let answers = page
        .browser
        .until(
            "ten answers",
            "return document.querySelector('[data-burst=settled]') && reading.cards('.burst > li')",
            &[],
        )
        .await;
    let answers: Vec<Seen> = answers.as_array().expect("a list").iter().map(Seen::new).collect();
    assert_eq!(answers.len(), 10);
    let firsts = answers.iter().filter(|answer| answer.outcome == "first").count();
    assert_eq!(firsts, 1, "{answers:?}");
    for answer in &answers {
        match answer.outcome.as_str() {
            "first" | "replayed" => assert_eq!(answer.status, Some(201)),
            _ => answer.must_be_refused(409, "request-in-progress"),
        }
    }
    let ids: BTreeSet<String> = answers.into_iter().filter_map(|answer| answer.id).collect();
    assert_eq!(page.effects(1).await, ids);
}

async fn a_changed_amount_is_refused(page: &Page<'_>) {
    let first = page.click_and_see("#send").await;
    first.must_be("first", 201);
    let changed = page.click_and_see("#send-changed").await;
    changed.must_be_refused(422, "idempotency-key-reused");
    assert!(
        changed
            .text
            .contains("Idempotency key was used for a different request"),
        "{changed:?}"
    );
    assert_eq!(page.effects(1).await, BTreeSet::from_iter(first.id));
}

async fn hanging_up_loses_the_answer_but_not_the_work(page: &Page<'_>) {
    // Long enough that the request is with the server by then, whatever else the machine does.
    page.browser.fill("#hang-up-after", "400").await;
    page.click_and_see("#send-hang-up").await.must_be("hung-up", None);
    page.browser
        .until(
            "the server noticed that its client left",
            "return reading.counter('detached') === '1'",
            &[],
        )
        .await;
    let answer = loop {
        let answer = page.click_and_see("#send-again").await;
        if answer.outcome == "replayed" {
            break answer;
        }
        // Until the handler is done there is nothing to replay.
        answer.must_be_refused(409, "request-in-progress");
    };
    answer.must_be("replayed", 201);
    assert_eq!(page.effects(1).await, BTreeSet::from_iter(answer.id));
}

async fn a_new_key_is_a_second_effect(page: &Page<'_>) {
    let first = page.click_and_see("#send").await;
    first.must_be("first", 201);
    page.browser.click("#new-key").await;
    let second = page.click_and_see("#send").await;
    second.must_be("first", 201);
    assert_ne!(first.id, second.id);
    let ids = [first, second].into_iter().filter_map(|answer| answer.id).collect();
    assert_eq!(page.effects(2).await, ids);
}

async fn a_panic_leaves_an_unknown_outcome_that_is_never_run_again(page: &Page<'_>) {
    page.browser.click("#panic").await;
    let broken = page.click_and_see("#send").await;
    // A browser may repeat a request by itself when a connection that it had used before breaks: then the page does
    // not see the break, but what the repetition was told.
    if broken.outcome == "refused" {
        broken.must_be_refused(409, "outcome-unknown");
    } else {
        broken.must_be("no-answer", None);
    }
    let again = page.click_and_see("#send-again").await;
    again.must_be_refused(409, "outcome-unknown");
    page.effects(0).await;
}

async fn every_operation_on_offer_works_and_is_protected(page: &Page<'_>) {
    let offered = page
        .browser
        .run(
            "return [...document.querySelectorAll('#route option')].map(o => o.value)",
            &[],
        )
        .await;
    let mut ids = BTreeSet::new();
    for route in offered.as_array().expect("a list") {
        page.browser.click(&format!("#route option[value={route}]")).await;
        let first = page.click_and_see("#send").await;
        first.must_be("first", 201);
        // Some providers answer a replay with another status.
        let again = page.click_and_see("#send-again").await;
        assert_eq!(again.outcome, "replayed", "{route}: {again:?}");
        assert_eq!(again.id, first.id, "{route}");
        let changed = page.click_and_see("#send-changed").await;
        assert_eq!(changed.outcome, "refused", "{route}: {changed:?}");
        ids.extend(first.id);
        assert_eq!(page.effects(ids.len()).await, ids, "{route}");
    }
    assert!(ids.len() >= 11, "all four providers are there: {ids:?}");
}

async fn what_a_user_typed_stays_text(page: &Page<'_>) {
    let markup = "<img/src=x/onerror=document.title='markup'>";
    page.browser.fill("#key", markup).await;
    page.browser.fill("#tenant", markup).await;
    let body = json!({"amount": 1, "note": markup}).to_string();
    page.browser.fill("#body", &body).await;
    let first = page.click_and_see("#send").await;
    first.must_be("first", 201);
    page.effects(1).await;
    page.browser
        .until(
            "the ledger shows the note",
            "return document.querySelector('#ledger').textContent.includes(arguments[0])",
            &[json!(markup)],
        )
        .await;
    page.browser.click("#answers summary").await;
    let transcript = page
        .browser
        .run("return document.querySelector('#answers').innerText", &[])
        .await;
    assert!(
        transcript.as_str().is_some_and(|text| text.contains(markup)),
        "{transcript}"
    );
    let images = page
        .browser
        .run("return document.querySelectorAll('img').length", &[])
        .await;
    assert_eq!(images, 0);
}

#[cfg(target_os = "linux")]
async fn an_error_of_a_handler_is_no_refusal(page: &Page<'_>) {
    for route in ["/payments", "/v1/payment/orders/refund"] {
        page.browser.click(&format!("#route option[value='{route}']")).await;
        page.click_and_see("#send").await.must_be("handler", 500);
    }
}

async fn without_a_database_there_are_no_accounts(page: &Page<'_>) {
    page.click_and_see("#send").await.must_be("first", 201);
    page.effects(1).await;
    assert_eq!(page.bank().await, json!({ "shown": false, "offered": false }));
}

/// All accounts hold as much at the start.
#[cfg(feature = "postgres")]
const SUM: &str = "1,000,000";

#[cfg(feature = "postgres")]
async fn a_transfer_is_seen_to_move_money_once_and_the_sum_stays(page: &Page<'_>) {
    let before = page.accounts(SUM).await;
    assert_eq!(before, vec!["100,000"; 10]);
    page.browser.click("#route option[value='/transfers']").await;
    let first = page.click_and_see("#send").await;
    first.must_be("first", 201);
    page.click_and_see("#send-again").await.must_be("replayed", 201);
    page.click_and_see("#send-changed")
        .await
        .must_be_refused(422, "idempotency-key-reused");
    assert_eq!(page.effects(1).await, BTreeSet::from_iter(first.id));
    let after = page.accounts(SUM).await;
    assert_eq!(after[..3], ["−25 99,975", "+25 100,025", "100,000"]);
    assert_eq!(after[2..], before[2..]);
}

#[cfg(feature = "postgres")]
async fn a_transfer_that_panics_between_its_halves_is_seen_to_move_nothing(page: &Page<'_>) {
    let before = page.accounts(SUM).await;
    // Those before the server was started are not shown.
    page.effects(0).await;
    page.browser.click("#route option[value='/transfers']").await;
    page.browser.click("#panic").await;
    page.click_and_see("#send").await.must_be("no-answer", None);
    // Which is said once the page has looked again.
    page.browser
        .until(
            "the outcome is announced",
            "return document.querySelector('#outcome').innerText.startsWith('No answer')",
            &[],
        )
        .await;
    page.effects(0).await;
    assert_eq!(page.accounts(SUM).await, before);
    let again = page.click_and_see("#send-again").await;
    again.must_be("first", 201);
    page.effects(1).await;
    assert_eq!(page.accounts(SUM).await[..2], ["−25 99,950", "+25 100,050"]);
}

#[cfg(feature = "postgres")]
async fn a_sum_that_does_change_is_said(page: &Page<'_>, server: &Postgres) {
    page.accounts(SUM).await;
    server
        .say("UPDATE demo_accounts SET balance = balance + 7 WHERE id = 10")
        .await;
    let after = page.accounts("1,000,007").await;
    assert_eq!(after[9], "+7 100,007");
    page.browser
        .until(
            "it is said what the sum was",
            "return document.querySelector('#sum-changed:not([hidden])')?.innerText
                 === 'It was 1,000,000 when this page was opened.'",
            &[],
        )
        .await;
}

/// The page of a fresh demo server.
struct Page<'a> {
    browser: &'a Browser,
    demo: Demo,
}

/// What the tests read off the page, as its users do.
const READING: &str = "
    window.reading = {
        cards: selector => [...document.querySelectorAll(selector)].map(card => ({
            outcome: card.dataset.outcome,
            status: card.querySelector('.status')?.textContent ?? null,
            id: card.querySelector('.id')?.textContent ?? null,
            problem: card.dataset.problem ?? null,
            text: card.innerText,
        })),
        sent: () => Number(document.querySelector('#sent-count').textContent),
        counter: name => [...document.querySelectorAll('#metrics dt')]
            .find(term => term.textContent === name)?.nextElementSibling.textContent ?? null,
    };
";

impl<'a> Page<'a> {
    async fn open(browser: &'a Browser) -> Self {
        Self::of(browser, Demo::start(&["--store", "memory"])).await
    }

    async fn of(browser: &'a Browser, demo: Demo) -> Self {
        let served = http::get(demo.address(), "/").await;
        assert!(
            served.body == include_str!("../examples/demo/page.html"),
            "the demo was built with another page: `cargo build --example demo`"
        );
        browser.open(&demo.url("/")).await;
        browser.run(READING, &[]).await;
        Self { browser, demo }
    }

    /// Clicks a button that sends one request and waits for the outcome.
    async fn click_and_see(&self, button: &str) -> Seen {
        let before = self
            .browser
            .run("return reading.cards('#answers > li').length", &[])
            .await;
        self.browser.click(button).await;
        let card = self
            .browser
            .until(
                &format!("an outcome of {button}"),
                "const all = reading.cards('#answers > li');
                 return all.length > arguments[0] && all[0].outcome !== 'waiting' && all[0]",
                &[before],
            )
            .await;
        Seen::new(&card)
    }

    /// Whether the accounts are shown, and transfers between them are on offer.
    async fn bank(&self) -> Value {
        let script = "return {
            shown: document.querySelector('#bank').checkVisibility(),
            offered: document.querySelector('#route option[value=\"/transfers\"]') !== null,
        }";
        self.browser.run(script, &[]).await
    }

    /// Waits until the accounts are said to hold so much together: what each of them does, after what moved last.
    #[cfg(feature = "postgres")]
    async fn accounts(&self, sum: &str) -> Vec<String> {
        let shown = self
            .browser
            .until(
                &format!("{sum} in all accounts"),
                "return document.querySelector('#accounts-sum').textContent === arguments[0]
                     && [...document.querySelectorAll('#accounts dd')].map(dd => [...dd.childNodes].map(n => n.textContent).join(' '))",
                &[json!(sum)],
            )
            .await;
        assert_eq!(self.bank().await, json!({ "shown": true, "offered": true }));
        serde_json::from_value(shown).expect("a list of texts")
    }

    /// Waits until the page counts so many effects, and returns their ids: the page's ledger and the server's say
    /// the same.
    async fn effects(&self, count: usize) -> BTreeSet<String> {
        let shown = self
            .browser
            .until(
                &format!("{count} effects in the ledger"),
                "return document.querySelector('#effects-count').textContent === arguments[0]
                     && [...document.querySelectorAll('#ledger .id')].map(id => id.textContent)",
                &[json!(count.to_string())],
            )
            .await;
        let ledger = http::get(self.demo.address(), "/ledger").await.json();
        let ids = |list: &Value, id: fn(&Value) -> &Value| -> BTreeSet<String> {
            let list = list.as_array().expect("a list").iter();
            list.map(|item| id(item).as_str().expect("an id").to_owned()).collect()
        };
        let shown = ids(&shown, |item| item);
        assert_eq!(shown, ids(&ledger["effects"], |effect| &effect["id"]));
        assert_eq!(shown.len(), count);
        shown
    }
}

/// An answer as the page shows it.
#[derive(Debug)]
struct Seen {
    outcome: String,
    status: Option<u16>,
    id: Option<String>,
    problem: Option<String>,
    text: String,
}

impl Seen {
    fn new(card: &Value) -> Self {
        let text = |member: &str| card[member].as_str().map(str::to_owned);
        Self {
            outcome: text("outcome").expect("an outcome"),
            status: text("status").map(|status| status.parse().expect("a status")),
            id: text("id"),
            problem: text("problem"),
            text: text("text").expect("a text"),
        }
    }

    #[track_caller]
    fn must_be(&self, outcome: &str, status: impl Into<Option<u16>>) {
        assert_eq!(
            (self.outcome.as_str(), self.status),
            (outcome, status.into()),
            "{self:?}"
        );
    }

    #[track_caller]
    fn must_be_refused(&self, status: u16, problem: &str) {
        self.must_be("refused", status);
        assert_eq!(self.problem.as_deref(), Some(problem), "{self:?}");
        assert!(self.text.contains("Refused"), "{self:?}");
    }
}
