//! Those who are measured: each one round at a time.

use std::{hint::black_box, ops::Range};

use axum::body::Body;
use cpu_time::ThreadTime;
use http::{Request, Response, StatusCode};
use tokio::runtime::Runtime;
use tower::Service;

use super::{
    BODY,
    service::{request, send},
};

pub const OPERATIONS: u64 = 2_000;

pub struct Contestant {
    pub name: &'static str,
    pub target: Option<f64>,
    round: Box<dyn FnMut(&Runtime) -> f64>,
}

impl Contestant {
    /// How long one operation of a round took, in nanoseconds.
    pub fn round(&mut self, runtime: &Runtime) -> f64 {
        (self.round)(runtime)
    }
}

fn timed(runtime: &Runtime, work: impl Future<Output = ()>) -> f64 {
    runtime.block_on(async {
        let start = ThreadTime::now();
        work.await;
        start.elapsed().as_nanos() as f64 / OPERATIONS as f64
    })
}

/// The same request again and again.
pub fn same<S, B>(
    name: &'static str,
    target: Option<f64>,
    mut service: S,
    status: StatusCode,
    make: impl Fn() -> Request<Body> + 'static,
) -> Contestant
where
    S: Service<Request<Body>, Response = Response<B>> + 'static,
    S::Error: std::fmt::Debug,
    B: http_body::Body + Unpin + 'static,
    B::Error: std::fmt::Debug,
{
    let round = move |runtime: &Runtime| {
        timed(runtime, async {
            for _ in 0..OPERATIONS {
                black_box(send(&mut service, make(), status).await);
            }
        })
    };
    Contestant {
        name,
        target,
        round: Box::new(round),
    }
}

/// A new key for every operation, over records of this round alone.
pub fn first<S, B>(name: &'static str, target: Option<f64>, protected: impl Fn() -> S + 'static) -> Contestant
where
    S: Service<Request<Body>, Response = Response<B>> + 'static,
    S::Error: std::fmt::Debug,
    B: http_body::Body + Unpin + 'static,
    B::Error: std::fmt::Debug,
{
    let mut key = 1 << 40;
    let mut before = Vec::new();
    let round = move |runtime: &Runtime| {
        let mut service = protected();
        let time = timed(runtime, async {
            for _ in 0..OPERATIONS {
                key += 1;
                black_box(send(&mut service, request(key, &BODY), StatusCode::OK).await);
            }
        });
        // Two rounds old ones are dropped, so that their memory is used again as in a server that has been running for
        // a while, and not fetched from the system anew.
        before.push(service);
        if before.len() > 2 {
            drop(before.remove(0));
        }
        time
    };
    Contestant {
        name,
        target,
        round: Box::new(round),
    }
}

/// Keys from all over a range, in an order that no cache foresees.
pub fn over_many<S, B>(name: &'static str, mut service: S, keys: Range<u64>) -> Contestant
where
    S: Service<Request<Body>, Response = Response<B>> + 'static,
    S::Error: std::fmt::Debug,
    B: http_body::Body + Unpin + 'static,
    B::Error: std::fmt::Debug,
{
    let mut state = 1u64;
    let round = move |runtime: &Runtime| {
        timed(runtime, async {
            for _ in 0..OPERATIONS {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let key = keys.start + (state >> 20) % (keys.end - keys.start);
                black_box(send(&mut service, request(key, &BODY), StatusCode::OK).await);
            }
        })
    };
    Contestant {
        name,
        target: None,
        round: Box::new(round),
    }
}
