#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    pin::pin,
    sync::{
        atomic::{AtomicU32, Ordering::Relaxed},
        mpsc::{Sender, channel},
    },
};

use futures_util::future::join_all;
use tokio::runtime::Builder;

use super::*;

/// How many were made at once each time.
#[derive(Default)]
struct Made(Mutex<Vec<usize>>);

type Doubling = Together<u32, u32>;

async fn double(made: Arc<Made>, steps: Vec<Asked<u32, u32>>) {
    made.0.lock().unwrap().push(steps.len());
    for Asked { step, told, .. } in steps {
        let _ = told.send(step * 2);
    }
}

fn watch(together: &Arc<Doubling>) -> Watch<u32, u32> {
    Watch {
        together: Arc::clone(together),
        of: Handle::current().id(),
        is_over: false,
    }
}

async fn join(together: &Arc<Doubling>, step: u32, enough: usize, made: &Arc<Made>) -> Result<u32, Unanswered> {
    let deadline = Instant::now() + Duration::from_secs(1);
    together.join(step, enough, deadline, made, double).await
}

#[tokio::test]
async fn steps_of_one_moment_are_made_at_once_and_each_gets_its_own_answer() {
    let (together, made) = (Arc::default(), Arc::default());
    for start in [0, 100] {
        let answers = join_all((start..start + 10).map(|step| join(&together, step, 50, &made))).await;
        let answers: Vec<_> = answers.into_iter().map(Result::unwrap).collect();
        assert_eq!(answers, (start..start + 10).map(|step| step * 2).collect::<Vec<_>>());
    }
    assert_eq!(*made.0.lock().unwrap(), [10, 10]);
}

#[tokio::test]
async fn once_there_are_enough_nobody_else_is_waited_for() {
    let (together, made) = (Arc::default(), Arc::default());
    let late = async {
        go_to_the_end().await;
        join(&together, 3, 2, &made).await
    };
    let (first, second, late) = tokio::join!(join(&together, 1, 2, &made), join(&together, 2, 2, &made), late);
    assert_eq!([first, second, late].map(Result::unwrap), [2, 4, 6]);
    let made = made.0.lock().unwrap();
    assert_eq!(made.iter().filter(|count| **count > 0).collect::<Vec<_>>(), [&2, &1]);
}

#[test]
fn those_of_different_runtimes_are_made_apart() {
    let runtime = || Builder::new_current_thread().enable_all().build().unwrap();
    let (still, other) = (runtime(), runtime());
    let (together, made) = (Arc::default(), Arc::default());
    let mut first = Box::pin(join(&together, 1, 50, &made));
    let poll = still.block_on(poll_fn(|context| Poll::Ready(first.as_mut().poll(context))));
    assert!(poll.is_pending());
    assert_eq!(other.block_on(join(&together, 2, 50, &made)).unwrap(), 4);
    assert_eq!(*made.0.lock().unwrap(), [1]);
    drop(still);
    assert!(matches!(other.block_on(first), Err(Unanswered::Left)));
}

#[tokio::test(start_paused = true)]
async fn who_is_not_seen_to_sees_to_all_where_no_watch_is_on_duty() {
    let (together, made): (Arc<Doubling>, Arc<Made>) = (Arc::default(), Arc::default());
    // As if the first one's turn were behind something that blocks, and the watch that it began.
    let (told, said) = oneshot::channel();
    assert!(together.add(Handle::current().id(), 1, told).begins_watch);
    let start = Instant::now();
    assert_eq!(join(&together, 2, 50, &made).await.unwrap(), 4);
    assert_eq!(said.await.unwrap(), 2);
    assert!(start.elapsed() >= PATIENCE);
    assert_eq!(*made.0.lock().unwrap(), [2]);
}

#[tokio::test(start_paused = true)]
async fn a_watch_sees_to_those_who_are_not_seen_to_until_there_are_none() {
    let (together, made): (Arc<Doubling>, Arc<Made>) = (Arc::default(), Arc::default());
    let (start, id) = (Instant::now(), Handle::current().id());
    let add = |step| {
        let (told, said) = oneshot::channel();
        (together.add(id, step, told), said)
    };
    // As if nobody had been given the turn.
    let (first, said_first) = add(1);
    assert!(first.begins_watch && !first.is_watched);
    let kept = tokio::spawn(watch(&together).keep(Handle::current(), Arc::clone(&made), double));
    go_to_the_end().await;
    let (second, said_second) = add(2);
    assert!(!second.begins_watch && second.is_watched);
    assert_eq!((said_first.await.unwrap(), said_second.await.unwrap()), (2, 4));
    assert!(
        (PATIENCE..=PATIENCE * 2).contains(&start.elapsed()),
        "{:?}",
        start.elapsed()
    );
    // Who comes while it is on duty is seen to, too.
    assert_eq!(join(&together, 3, 50, &made).await.unwrap(), 6);
    kept.await.unwrap();
    assert!(start.elapsed() <= PATIENCE * 4, "{:?}", start.elapsed());
    assert_eq!(*made.0.lock().unwrap(), [2, 1]);
    assert!(add(4).0.begins_watch, "the next one begins another");
}

#[test]
fn those_who_are_watched_are_told_when_their_runtime_is_gone() {
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    let (together, made): (Arc<Doubling>, Arc<Made>) = (Arc::default(), Arc::default());
    let (told, said) = oneshot::channel();
    runtime.block_on(async {
        assert!(together.add(Handle::current().id(), 1, told).begins_watch);
        tokio::spawn(watch(&together).keep(Handle::current(), made, double));
        go_to_the_end().await;
        let of = Handle::current().id();
        assert!(together.waiting().watched(of).is_some_and(|watched| watched.on_duty));
    });
    drop(runtime);
    assert!(said.blocking_recv().is_err());
    assert!(together.waiting().watched.is_empty());
}

/// Blocks its thread at the `poll`th poll of a step that is about to be made, until it is let go.
async fn block_at(
    poll: usize,
    step: impl Future<Output = Result<u32, Unanswered>>,
    blocked: Sender<Sender<()>>,
) -> u32 {
    let (mut step, mut polls) = (pin!(step), 0);
    poll_fn(|context| {
        let polled = step.as_mut().poll(context);
        polls += 1;
        if polls == poll {
            let (let_go, until) = channel::<()>();
            // Whoever holds the other end of this lets go by dropping it.
            blocked.send(let_go).unwrap();
            let _ = until.recv();
        }
        polled
    })
    .await
    .unwrap()
}

#[test]
fn steps_behind_threads_that_are_blocked_are_made_by_another() {
    let runtime = Builder::new_multi_thread()
        .worker_threads(3)
        .enable_all()
        .build()
        .unwrap();
    let (together, made): (Arc<Doubling>, Arc<Made>) = Default::default();
    let step = |step| {
        let (together, made) = (Arc::clone(&together), Arc::clone(&made));
        async move {
            let deadline = Instant::now() + Duration::from_secs(60);
            together.join(step, 50, deadline, &made, double).await
        }
    };
    let (blocked, blocks) = channel();
    // One that never comes on duty.
    together.waiting().watched.push(Watched {
        of: runtime.handle().id(),
        on_duty: false,
        has_come: false,
    });
    // The first has its turn in a place from which nobody takes it: next on the thread that it blocks. The second has
    // lost its patience by then, and blocks another thread with the turn that follows from that.
    let first = runtime.spawn(block_at(1, step(1), blocked.clone()));
    let first_block = blocks.recv().unwrap();
    let second = runtime.spawn(block_at(2, step(2), blocked));
    let second_block = blocks.recv().unwrap();
    assert_eq!(runtime.block_on(runtime.spawn(step(3))).unwrap().unwrap(), 6);
    drop((first_block, second_block));
    assert_eq!(runtime.block_on(first).unwrap(), 2);
    assert_eq!(runtime.block_on(second).unwrap(), 4);
    let made: usize = made.0.lock().unwrap().iter().sum();
    assert_eq!(made, 3, "each once");
}

#[test]
fn steps_behind_a_thread_that_is_blocked_are_made_by_the_watch() {
    let runtime = Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let (together, made): (Arc<Doubling>, Arc<Made>) = Default::default();
    let _entered = runtime.enter();
    let id = runtime.handle().id();
    // What is there keeps the watch on duty.
    let (told, said) = oneshot::channel();
    assert!(together.add(id, 1, told).begins_watch);
    runtime.spawn(watch(&together).keep(runtime.handle().clone(), Arc::clone(&made), double));
    runtime.block_on(async {
        while !together.waiting().watched(id).is_some_and(|watched| watched.on_duty) {
            tokio::task::yield_now().await;
        }
    });
    let step = |step, enough| {
        let (together, made) = (Arc::clone(&together), Arc::clone(&made));
        async move { join(&together, step, enough, &made).await }
    };
    let (blocked, blocks) = channel();
    // Makes enough of them, so that it has the turn: next on the thread that it blocks.
    let blocking = runtime.spawn(block_at(1, step(2, 2), blocked));
    let block = blocks.recv().unwrap();
    let third = runtime.spawn(step(3, 50));
    let answers = runtime.block_on(async { (said.await.unwrap(), third.await.unwrap().unwrap()) });
    assert_eq!(answers, (2, 6));
    drop(block);
    assert_eq!(runtime.block_on(blocking).unwrap(), 4);
}

#[test]
fn on_many_threads_each_gets_its_own_answer_and_none_is_made_twice() {
    const TASKS: u32 = 64;
    const STEPS: u32 = 200;
    /// How often each was made: first those that are waited for, then those that are left at once.
    type Times = Vec<AtomicU32>;
    async fn count(times: Arc<Times>, steps: Vec<Asked<u32, u32>>) {
        for Asked { step, told, .. } in steps {
            times[step as usize].fetch_add(1, Relaxed);
            let _ = told.send(step * 2);
        }
    }
    let runtime = Builder::new_multi_thread()
        .worker_threads(4)
        .enable_all()
        .build()
        .unwrap();
    let together: Arc<Doubling> = Arc::default();
    let times: Arc<Times> = Arc::new((0..2 * TASKS * STEPS).map(|_| AtomicU32::new(0)).collect());
    let tasks: Vec<_> = (0..TASKS)
        .map(|task| {
            let (together, times) = (Arc::clone(&together), Arc::clone(&times));
            runtime.spawn(async move {
                for step in task * STEPS..(task + 1) * STEPS {
                    let deadline = Instant::now() + Duration::from_secs(60);
                    let enough = [2, 7, 50][step as usize % 3];
                    let join = |step| together.join(step, enough, deadline, &times, count);
                    assert_eq!(join(step).await.unwrap(), step * 2);
                    if step.is_multiple_of(5) {
                        // The turn that it leaves behind may be that of others.
                        let mut left = Box::pin(join(TASKS * STEPS + step));
                        poll_fn(|context| Poll::Ready(left.as_mut().poll(context).is_pending())).await;
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        runtime.block_on(task).unwrap();
    }
    let times: Vec<_> = times.iter().map(|times| times.load(Relaxed)).collect();
    let (waited, left) = times.split_at((TASKS * STEPS) as usize);
    assert!(waited.iter().all(|times| *times == 1));
    assert!(left.iter().all(|times| *times <= 1));
}

#[tokio::test(start_paused = true)]
async fn whoever_has_no_answer_by_its_deadline_is_told_so() {
    let (together, nothing): (Arc<Doubling>, _) = (Arc::default(), Arc::new(()));
    let deadline = Instant::now() + Duration::from_secs(1);
    let never = |_, steps: Vec<Asked<u32, u32>>| async move {
        std::future::pending::<()>().await;
        drop(steps);
    };
    let answer = together.join(1, 50, deadline, &nothing, never).await;
    assert!(matches!(answer, Err(Unanswered::Late(_))));
    assert_eq!(Instant::now().duration_since(deadline).as_millis(), 0);
}

#[tokio::test]
async fn what_nobody_waits_for_any_more_is_not_made() {
    let (together, made) = (Arc::default(), Arc::default());
    {
        let mut left = Box::pin(join(&together, 1, 50, &made));
        assert!(
            poll_fn(|context| Poll::Ready(left.as_mut().poll(context)))
                .await
                .is_pending()
        );
    }
    assert_eq!(join(&together, 2, 50, &made).await.unwrap(), 4);
    assert_eq!(*made.0.lock().unwrap(), [1]);
}
