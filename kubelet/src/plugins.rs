//! Plugins that make themselves known by a socket in `<root>/plugins_registry`: CSI drivers and DRA drivers. The directory is
//! looked at each second; a socket that is new is asked what it is, handed to who knows its type, and told how that went;
//! one that is gone is taken out again. As the plugin manager, without inotify.

use std::collections::BTreeMap;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use proto::pluginregistration::registration_client::RegistrationClient;
use proto::pluginregistration::{InfoRequest, PluginInfo, RegistrationStatus};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tracing::{info, warn};

use crate::runtime::cri::unix_channel;

const POLL: Duration = Duration::from_secs(1);
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// A plugin that could not be registered is asked again after so many polls.
const RETRY_POLLS: u32 = 5;

/// Who takes plugins of one type.
pub trait Registry: Send + Sync {
    /// `CSIPlugin`, `DRAPlugin`.
    fn plugin_type(&self) -> &'static str;
    /// Takes a plugin, to be spoken to over `channel`. `Err` is told to the plugin.
    fn register<'a>(
        &'a self,
        info: &'a PluginInfo,
        channel: Channel,
    ) -> futures::future::BoxFuture<'a, Result<(), String>>;
    /// The plugin's socket is gone.
    fn deregister<'a>(&'a self, name: &'a str) -> futures::future::BoxFuture<'a, ()>;
}

/// A socket that was seen: its identity, and which plugin it was, once registered.
struct Seen {
    identity: (u64, i64),
    registered: Option<PluginInfo>,
    polls: u32,
}

/// Follows the directory until shutdown.
pub async fn follow(directory: PathBuf, registries: Vec<std::sync::Arc<dyn Registry>>, shutdown: CancellationToken) {
    if let Err(error) = std::fs::create_dir_all(&directory) {
        warn!(directory = %directory.display(), %error, "no directory for plugins");
        return;
    }
    let mut seen: BTreeMap<PathBuf, Seen> = BTreeMap::new();
    loop {
        let now = sockets(&directory);
        let gone: Vec<PathBuf> = seen
            .iter()
            .filter(|(path, seen)| now.get(*path) != Some(&seen.identity))
            .map(|(path, _)| path.clone())
            .collect();
        for path in gone {
            let Some(Seen { registered: Some(plugin), .. }) = seen.remove(&path) else { continue };
            // A new socket may have taken over the name.
            let replaced = seen
                .values()
                .any(|s| s.registered.as_ref().is_some_and(|p| p.name == plugin.name && p.r#type == plugin.r#type));
            if !replaced {
                info!(plugin = %plugin.name, kind = %plugin.r#type, "plugin is gone");
                for registry in registries.iter().filter(|r| r.plugin_type() == plugin.r#type) {
                    registry.deregister(&plugin.name).await;
                }
            }
        }
        for (path, identity) in now {
            let entry = seen.entry(path.clone()).or_insert(Seen { identity, registered: None, polls: 0 });
            if entry.registered.is_none() && entry.polls.is_multiple_of(RETRY_POLLS) {
                match register(&path, &registries).await {
                    Ok(plugin) => {
                        info!(plugin = %plugin.name, kind = %plugin.r#type, "plugin registered");
                        entry.registered = Some(plugin);
                    }
                    Err(error) => warn!(socket = %path.display(), error, "plugin not registered"),
                }
            }
            entry.polls = entry.polls.wrapping_add(1);
        }
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(POLL) => {}
        }
    }
}

/// The sockets in a directory, with what tells a new one at the same path.
fn sockets(directory: &Path) -> BTreeMap<PathBuf, (u64, i64)> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let meta = entry.metadata().ok().filter(|m| m.file_type().is_socket())?;
            let hidden = entry.file_name().to_string_lossy().starts_with('.');
            (!hidden).then(|| (entry.path(), (meta.ino(), meta.ctime_nsec())))
        })
        .collect()
}

async fn register(socket: &Path, registries: &[std::sync::Arc<dyn Registry>]) -> Result<PluginInfo, String> {
    let mut client = RegistrationClient::new(unix_channel(socket.to_owned()));
    let asked = tokio::time::timeout(CALL_TIMEOUT, client.get_info(InfoRequest {})).await;
    let plugin = asked.map_err(|_| "no answer in time".to_owned())?.map_err(|s| s.message().to_owned())?.into_inner();
    let endpoint = if plugin.endpoint.is_empty() { socket.to_owned() } else { PathBuf::from(&plugin.endpoint) };
    let registry = registries.iter().find(|r| r.plugin_type() == plugin.r#type);
    let outcome = match registry {
        Some(registry) => registry.register(&plugin, unix_channel(endpoint)).await,
        None => Err(format!("no handler registered for plugin type: {}", plugin.r#type)),
    };
    let error = outcome.as_ref().err().cloned().unwrap_or_default();
    let status = RegistrationStatus { plugin_registered: outcome.is_ok(), error };
    let told = tokio::time::timeout(CALL_TIMEOUT, client.notify_registration_status(status)).await;
    if !matches!(told, Ok(Ok(_))) {
        warn!(plugin = %plugin.name, "the plugin does not take word of its registration");
    }
    outcome.map(|()| plugin)
}
