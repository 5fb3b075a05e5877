//! What is kept comes back as it was.

use http::{HeaderMap, HeaderValue, StatusCode};

use super::{Bench, Checks, Subject, response};
use crate::codec::StoredResponse;

pub(super) fn check<'a>(subject: &'a impl Subject, checks: &mut Checks<'a>) {
    checks.add(10, "an answer comes back byte for byte, whatever its size", || {
        answers(subject)
    });
    checks.add(10, "the fact that an answer was not kept comes back", || {
        not_kept(subject)
    });
}

type Checked = Result<(), String>;

async fn answers(subject: &impl Subject) -> Checked {
    let every_byte: Vec<u8> = (0..=255).collect();
    let mut headers = HeaderMap::new();
    headers.append("x-twice", HeaderValue::from_static("one"));
    headers.append("x-twice", HeaderValue::from_static("two"));
    let mut trailers = HeaderMap::new();
    trailers.append("grpc-status", HeaderValue::from_static("0"));
    let with_trailers = StoredResponse::encode(StatusCode::OK, &headers, |_| true, &every_byte, Some(&trailers));
    for answer in [
        response(b""),
        response(&every_byte),
        response(&every_byte.repeat(1024)),
        with_trailers,
    ] {
        let bench = Bench::new(subject).await?;
        let lease = bench.acquire(&bench.claim(1)?).await?;
        bench.complete(&lease, &answer).await?;
        bench.expect_completed(1, &answer).await?;
    }
    Ok(())
}

async fn not_kept(subject: &impl Subject) -> Checked {
    let bench = Bench::new(subject).await?;
    let lease = bench.acquire(&bench.claim(1)?).await?;
    let answer = StoredResponse::not_kept(StatusCode::ACCEPTED);
    bench.complete(&lease, &answer).await?;
    bench.expect_completed(1, &answer).await
}
