//! Is what several clients saw of one object, at two servers, while etcd was killed and started again, as if everything had
//! happened at one place, one after the other?
//!
//! Every write that is acknowledged names its revision, and every read the revision that it saw: that is the order. It
//! remains to check that the order agrees with time, and that each read saw what its revision holds.

use crate::common::{Server, has_etcd};
use crate::{PATH, start, version};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// One call. Times in µs since the beginning.
#[derive(Clone, Debug)]
struct Call {
    began: u128,
    ended: u128,
    what: What,
}

#[derive(Clone, Debug)]
enum What {
    Wrote {
        value: String,
        revision: i64,
    },
    /// It failed: it may have been done at any time since it began, or never.
    MayHaveWritten {
        value: String,
    },
    Read {
        value: String,
        revision: i64,
    },
}

impl Call {
    fn revision(&self) -> Option<i64> {
        match &self.what {
            What::Wrote { revision, .. } | What::Read { revision, .. } => Some(*revision),
            What::MayHaveWritten { .. } => None,
        }
    }
}

/// What contradicts linearizability, if anything does.
fn contradiction(history: &[Call]) -> Option<String> {
    let mut written: BTreeMap<i64, &Call> = BTreeMap::new();
    let mut uncertain: BTreeMap<&str, &Call> = BTreeMap::new();
    for call in history {
        match &call.what {
            What::Wrote { revision, .. } => {
                if let Some(other) = written.insert(*revision, call) {
                    return Some(format!("two writes have one revision: {call:?} {other:?}"));
                }
            }
            What::MayHaveWritten { value } => _ = uncertain.insert(value, call),
            What::Read { .. } => {}
        }
    }
    let mut seen: BTreeMap<i64, &str> = BTreeMap::new();
    for call in history {
        let What::Read { value, revision } = &call.what else { continue };
        if *seen.entry(*revision).or_insert(value) != value {
            return Some(format!("one revision has two values: {call:?}"));
        }
        let writer = match written.get(revision) {
            Some(writer) => *writer,
            None => match uncertain.get(value.as_str()) {
                Some(writer) => *writer,
                None => return Some(format!("nobody wrote this: {call:?}")),
            },
        };
        if let What::Wrote { value: wrote, .. } = &writer.what
            && wrote != value
        {
            return Some(format!("another value was written: {call:?} {writer:?}"));
        }
        if call.ended < writer.began {
            return Some(format!("it was read before it was written: {call:?} {writer:?}"));
        }
    }
    // What ended before something began has no later revision; if that is a write, an earlier one.
    let mut by_end: Vec<&Call> = history.iter().filter(|call| call.revision().is_some()).collect();
    let mut by_begin = by_end.clone();
    by_end.sort_by_key(|call| call.ended);
    by_begin.sort_by_key(|call| call.began);
    let (mut ended, mut newest) = (by_end.into_iter().peekable(), None::<&Call>);
    for call in by_begin {
        while let Some(before) = ended.next_if(|before| before.ended < call.began) {
            if newest.is_none_or(|n| n.revision() < before.revision()) {
                newest = Some(before);
            }
        }
        let Some(before) = newest else { continue };
        let stale = match call.what {
            What::Wrote { .. } => call.revision() <= before.revision(),
            _ => call.revision() < before.revision(),
        };
        if stale {
            return Some(format!("it ignores what was over before it began: {call:?} after {before:?}"));
        }
    }
    None
}

#[test]
fn contradictions_are_found() {
    let wrote = |began, ended, value: &str, revision| Call {
        began,
        ended,
        what: What::Wrote { value: value.to_owned(), revision },
    };
    let read = |began, ended, value: &str, revision| Call {
        began,
        ended,
        what: What::Read { value: value.to_owned(), revision },
    };
    let maybe =
        |began, ended, value: &str| Call { began, ended, what: What::MayHaveWritten { value: value.to_owned() } };
    for (history, fine) in [
        (vec![wrote(0, 1, "a", 1), read(2, 3, "a", 1)], true),
        (vec![wrote(0, 1, "a", 1), wrote(2, 5, "b", 2), read(3, 4, "a", 1), read(3, 4, "b", 2)], true),
        (vec![wrote(0, 1, "a", 1), maybe(2, 3, "b"), read(9, 10, "b", 2)], true),
        (vec![wrote(0, 1, "a", 1), maybe(2, 3, "b"), read(9, 10, "a", 1)], true),
        // A stale read.
        (vec![wrote(0, 1, "a", 1), wrote(2, 3, "b", 2), read(4, 5, "a", 1)], false),
        // The new, then the old.
        (vec![wrote(0, 1, "a", 1), wrote(2, 9, "b", 2), read(3, 4, "b", 2), read(5, 6, "a", 1)], false),
        // From nowhere, from the future, and mixed up.
        (vec![wrote(0, 1, "a", 1), read(2, 3, "c", 2)], false),
        (vec![wrote(0, 1, "a", 1), read(2, 3, "b", 2), wrote(4, 5, "b", 2)], false),
        (vec![wrote(0, 1, "a", 1), read(2, 3, "b", 1)], false),
        (vec![wrote(0, 1, "a", 2), wrote(2, 3, "b", 1)], false),
        (vec![wrote(0, 1, "a", 1), wrote(0, 1, "b", 1)], false),
    ] {
        assert_eq!(contradiction(&history).is_none(), fine, "{history:?}");
    }
}

const CLIENTS: usize = 6;
const FOR: Duration = Duration::from_secs(12);

/// Reads and writes one object until the time is over.
async fn client(client: kube::Client, id: usize, begun: Instant) -> Vec<Call> {
    let path = format!("{PATH}/register");
    let mut history = Vec::new();
    for turn in 0.. {
        let began = begun.elapsed();
        if began > FOR {
            break;
        }
        let value = format!("{id}-{turn}");
        let reads = (turn + id).is_multiple_of(3);
        let request = if reads {
            http::Request::get(&path).body(Vec::new()).unwrap()
        } else {
            let patch = json!({"data": {"value": value}}).to_string().into_bytes();
            http::Request::patch(&path).header("content-type", "application/merge-patch+json").body(patch).unwrap()
        };
        let answer = tokio::time::timeout(Duration::from_secs(20), client.request::<Value>(request)).await;
        let ended = begun.elapsed();
        let what = match (reads, answer) {
            (true, Ok(Ok(object))) => What::Read {
                value: object["data"]["value"].as_str().unwrap_or("").to_owned(),
                revision: version(&object).parse().unwrap(),
            },
            (false, Ok(Ok(object))) => What::Wrote { value, revision: version(&object).parse().unwrap() },
            (true, _) => continue,
            // Refused before anything was tried.
            (false, Ok(Err(kube::Error::Api(status)))) if matches!(status.code, 409 | 429) => continue,
            (false, _) => What::MayHaveWritten { value },
        };
        history.push(Call { began: began.as_micros(), ended: ended.as_micros(), what });
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    history
}

#[tokio::test(flavor = "multi_thread")]
async fn what_clients_see_of_one_object_is_linearizable_while_etcd_dies_and_comes_back() {
    if !has_etcd() {
        return;
    }
    let mut server = start(&["--etcd-compaction-interval=2s"]).await;
    let sibling = server.sibling().await;
    let register = json!({"metadata": {"name": "register"}, "data": {"value": "first"}});
    let first = server.post(PATH, &register).await.unwrap();
    let begun = Instant::now();
    let mut history = vec![Call {
        began: 0,
        ended: 0,
        what: What::Wrote { value: "first".to_owned(), revision: version(&first).parse().unwrap() },
    }];
    let clients: Vec<_> = (0..CLIENTS)
        .map(|id| {
            let at: &Server = if id % 2 == 0 { &server } else { &sibling };
            tokio::spawn(client(at.client.clone(), id, begun))
        })
        .collect();
    for _ in 0..2 {
        tokio::time::sleep(FOR / 4).await;
        server.kill_etcd();
        tokio::time::sleep(Duration::from_millis(500)).await;
        server.start_etcd();
    }
    for client in clients {
        history.extend(client.await.unwrap());
    }
    assert_eq!(contradiction(&history), None);
    let succeeded = history.iter().filter(|call| call.revision().is_some()).count();
    assert!(succeeded > 50, "only {succeeded} of {} calls were answered", history.len());
}
