//! Fills the caches: one list of everything, then one watch over everything, resumed where it broke off. Only when the
//! history needed for that is gone is everything listed anew, and all watchers sent away: never a gap.

use super::cache::Objects;
use super::etcd::EtcdError;
use super::{Store, keys};
use etcd_client::{EventType, WatchOptions, WatchResponse};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tracing::{info, warn};

const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(3);
/// Without a message for this long the watch is put to the test.
const HEARTBEAT: Duration = Duration::from_secs(15);

/// Why a watch ended.
enum End {
    /// It can go on where it stopped.
    Broken(String),
    /// History was compacted beyond that.
    Compacted,
}

/// Runs for ever.
pub(super) async fn run(store: Arc<Store>) {
    let mut pause = RETRY_MIN;
    let mut listed = false;
    loop {
        if !listed {
            match list(&store).await {
                Ok(revision) => {
                    info!(revision, "watch cache filled");
                    listed = true;
                    pause = RETRY_MIN;
                }
                Err(error) => {
                    warn!(%error, retry_in = ?pause, "cannot list from etcd");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(RETRY_MAX);
                    continue;
                }
            }
        }
        let before = store.progress();
        match watch(&store).await {
            End::Compacted => {
                warn!(after = store.progress(), "etcd has compacted what the watch needs; listing everything anew");
                listed = false;
            }
            End::Broken(reason) => {
                if store.progress() > before {
                    pause = RETRY_MIN;
                }
                warn!(reason, after = store.progress(), retry_in = ?pause, "the watch on etcd broke off");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(RETRY_MAX);
            }
        }
    }
}

/// Reads everything at one revision, and begins all caches with it.
async fn list(store: &Store) -> Result<i64, EtcdError> {
    let root = format!("{}/", store.root);
    let end = keys::range_end(&root);
    let mut found: HashMap<&str, Objects> =
        store.rooms.keys().map(|prefix| (prefix.as_str(), Objects::new())).collect();
    let (mut from, mut revision) = (root.into_bytes(), 0);
    loop {
        let (page, at, count) = store.etcd.page(&from, &end, revision, super::PAGE).await?;
        revision = at;
        let more = count > page.len() as i64;
        if let Some(last) = page.last() {
            from = [last.key.as_bytes(), b"\0"].concat();
        }
        for stored in page {
            let Some((prefix, key)) = keys::split(&store.root, &stored.key, |p| store.rooms.contains_key(p)) else {
                continue;
            };
            if let (Some(room), Some(objects)) = (store.rooms.get(prefix), found.get_mut(prefix)) {
                objects.insert(key.into(), store.read_stored(room, &stored));
            }
        }
        if !more {
            break;
        }
    }
    for (prefix, objects) in found {
        if let Some(room) = store.rooms.get(prefix) {
            room.cache.reset(objects, revision);
        }
    }
    // What was on its way is in the list, or will come as an event and be parsed.
    store.pending.lock().clear();
    store.progress.send_replace(revision);
    Ok(revision)
}

/// Watches from where the caches are, until something ends it.
async fn watch(store: &Store) -> End {
    tokio::spawn({
        let etcd = store.etcd.clone();
        async move { etcd.learn_versions().await }
    });
    let broken = |error: &dyn std::fmt::Display| End::Broken(error.to_string());
    let options = WatchOptions::new().with_prefix().with_start_revision(store.progress() + 1).with_progress_notify();
    let mut client = store.etcd.watch_client();
    let opening = client.watch(format!("{}/", store.root), Some(options));
    let mut stream = match tokio::time::timeout(HEARTBEAT, opening).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return broken(&error),
        Err(_) => return End::Broken("etcd does not answer".to_owned()),
    };
    loop {
        let message = tokio::select! {
            message = tokio::time::timeout(HEARTBEAT, stream.message()) => message,
            () = store.restart_feed.notified() => return End::Broken("it had fallen behind".to_owned()),
            // Someone waits for a revision that may have been made outside our prefix.
            () = store.ask_progress.notified() => {
                if let Err(error) = stream.request_progress().await {
                    return broken(&error);
                }
                continue;
            }
        };
        match message {
            Ok(Ok(Some(response))) => {
                if response.compact_revision() > 0 {
                    return End::Compacted;
                }
                if response.canceled() {
                    return End::Broken(response.cancel_reason().to_owned());
                }
                apply(store, &response);
            }
            Ok(Ok(None)) => return End::Broken("etcd closed it".to_owned()),
            Ok(Err(error)) => return broken(&error),
            Err(_) => {
                // Silence. If etcd has moved on and the watch does not hear of it, it hangs.
                let newest = match store.etcd.revision().await {
                    Ok(newest) => newest,
                    Err(error) => return broken(&error),
                };
                if newest < store.progress() {
                    // It has been restored from a backup: what we know of lies in a future that never was.
                    return End::Compacted;
                }
                if newest > store.progress() && !moves(store, &mut stream).await {
                    return End::Broken("it hangs".to_owned());
                }
            }
        }
    }
}

/// Writes a mark and waits for anything to come through.
async fn moves(store: &Store, stream: &mut etcd_client::WatchStream) -> bool {
    if store.etcd.put_always(&format!("{}/pilothouse/progress", store.root), b"{}").await.is_err() {
        return false;
    }
    match tokio::time::timeout(super::FRESH_WAIT, stream.message()).await {
        Ok(Ok(Some(response))) if response.compact_revision() == 0 && !response.canceled() => {
            apply(store, &response);
            true
        }
        _ => false,
    }
}

/// Brings a batch of events into the caches, then says so.
fn apply(store: &Store, response: &WatchResponse) {
    let mut newest = store.progress();
    if response.events().is_empty() && !response.created() && store.etcd.progress_is_true() {
        // A progress notification: whatever happened up to its revision has been sent.
        newest = newest.max(response.header().map_or(0, |h| h.revision()));
    }
    let mut batches: HashMap<&str, Vec<_>> = HashMap::new();
    for event in response.events() {
        let Some(kv) = event.kv() else { continue };
        newest = newest.max(kv.mod_revision());
        let full = String::from_utf8_lossy(kv.key());
        let Some((prefix, key)) = keys::split(&store.root, &full, |p| store.rooms.contains_key(p)) else { continue };
        let Some((prefix, room)) = store.rooms.get_key_value(prefix) else { continue };
        let object = match event.event_type() {
            EventType::Delete => None,
            EventType::Put => {
                Some(store.parse(room, &full, kv.value(), kv.mod_revision(), kv.create_revision() == kv.mod_revision()))
            }
        };
        batches.entry(prefix.as_str()).or_default().push((Arc::<str>::from(key), kv.mod_revision(), object));
    }
    for (prefix, changes) in batches {
        if let Some(room) = store.rooms.get(prefix) {
            room.cache.apply(changes);
        }
    }
    if newest > store.progress() {
        store.progress.send_replace(newest);
    }
}
