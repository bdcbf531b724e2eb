//! Fills the caches: one list of everything, then one watch over everything, resumed where it broke off. Only when the
//! history needed for that is gone is everything listed anew, and all watchers sent away: never a gap.

use super::cache::Objects;
use super::etcd::messages::{self, Watched};
use super::etcd::{EtcdError, Stream};
use super::{Store, keys};
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
    let root = format!("{}/", store.root);
    let end = keys::range_end(&root);
    let mut stream = match store.etcd.watch(root.as_bytes(), &end, store.progress() + 1).await {
        Ok(stream) => stream,
        Err(error) => return broken(&error),
    };
    loop {
        let message = tokio::select! {
            message = tokio::time::timeout(HEARTBEAT, stream.message()) => message,
            () = store.restart_feed.notified() => return End::Broken("it had fallen behind".to_owned()),
            // Someone waits for a revision that may have been made outside our prefix.
            () = store.ask_progress.notified() => {
                if let Err(error) = stream.send(messages::progress()) {
                    return broken(&error);
                }
                continue;
            }
        };
        match message {
            Ok(Ok(Some(message))) => match messages::watched(&message) {
                Ok(watched) if watched.compact_revision > 0 => return End::Compacted,
                Ok(watched) if watched.canceled => return broken(&String::from_utf8_lossy(watched.cancel_reason)),
                Ok(watched) => apply(store, &watched),
                Err(error) => return broken(&error),
            },
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
async fn moves(store: &Store, stream: &mut Stream) -> bool {
    if store.etcd.put_always(&format!("{}/pilothouse/progress", store.root), b"{}").await.is_err() {
        return false;
    }
    let Ok(Ok(Some(message))) = tokio::time::timeout(super::FRESH_WAIT, stream.message()).await else { return false };
    match messages::watched(&message) {
        Ok(watched) if watched.compact_revision == 0 && !watched.canceled => {
            apply(store, &watched);
            true
        }
        _ => false,
    }
}

/// Brings a batch of events into the caches, then says so.
fn apply(store: &Store, watched: &Watched<'_>) {
    let mut newest = store.progress();
    if watched.events.is_empty() && !watched.created && store.etcd.progress_is_true() {
        // A progress notification: whatever happened up to its revision has been sent.
        newest = newest.max(watched.revision);
    }
    let mut batches: HashMap<&str, Vec<_>> = HashMap::new();
    for event in &watched.events {
        let kv = &event.kv;
        newest = newest.max(kv.mod_revision);
        let full = String::from_utf8_lossy(kv.key);
        let Some((prefix, key)) = keys::split(&store.root, &full, |p| store.rooms.contains_key(p)) else { continue };
        let Some((prefix, room)) = store.rooms.get_key_value(prefix) else { continue };
        let created = kv.create_revision == kv.mod_revision;
        let object = (!event.deleted).then(|| store.parse(room, &full, kv.value, kv.mod_revision, created));
        batches.entry(prefix.as_str()).or_default().push((Arc::<str>::from(key), kv.mod_revision, object));
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
