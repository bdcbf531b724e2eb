//! What drivers of dynamic resources say of their devices' health. Each driver that can is listened to as long as it is
//! registered; what it said last counts for a while. As `healthInfoCache`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use component_base::backoff::Backoff;
use k8s_openapi::api::core::v1::ResourceHealth;
use parking_lot::Mutex;
use proto::dra_health as pb;
use proto::dra_health::HealthStatus;
use proto::dra_health::dra_resource_health_client::DraResourceHealthClient;
use tokio::sync::Notify;
use tonic::transport::Channel;
use tracing::{debug, info};

/// How long a device's health counts where its driver does not say.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);
const RETRY_BASE: Duration = Duration::from_secs(1);
const RETRY_CAP: Duration = Duration::from_secs(60);
/// Devices of one driver that are kept; more are passed over.
const MAX_DEVICES: usize = 4096;
/// What of a message goes into a pod's status.
const MAX_MESSAGE_CHARS: usize = 1024;

/// What was said of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Said {
    health: HealthStatus,
    message: String,
    timeout: Duration,
}

/// By pool and device.
type Devices = BTreeMap<(String, String), (Said, Instant)>;

/// The health of all drivers' devices.
#[derive(Default)]
pub(crate) struct Healths {
    drivers: Mutex<BTreeMap<String, Devices>>,
    /// Something was said that is news.
    pub changed: Notify,
}

// === impl Healths ===

impl Healths {
    /// A device's health, under this name in a pod's status.
    pub(crate) fn of(&self, driver: &str, pool: &str, device: &str, id: String, now: Instant) -> ResourceHealth {
        let drivers = self.drivers.lock();
        let said = drivers.get(driver).and_then(|devices| devices.get(&(pool.to_owned(), device.to_owned())));
        let said = said.filter(|(said, at)| now.saturating_duration_since(*at) <= said.timeout).map(|(said, _)| said);
        let health = match said.map(|said| said.health) {
            Some(HealthStatus::Healthy) => "Healthy",
            Some(HealthStatus::Unhealthy) => "Unhealthy",
            Some(HealthStatus::Unknown) | None => "Unknown",
        };
        let message = said.map(|said| said.message.clone()).filter(|message| !message.is_empty());
        ResourceHealth { health: Some(health.to_owned()), message, resource_id: id }
    }

    /// Takes what a driver says of its devices. Devices that it passes over keep what was said of them until that is old.
    fn take(&self, driver: &str, devices: Vec<pb::DeviceHealth>, now: Instant) {
        let mut drivers = self.drivers.lock();
        let known = drivers.entry(driver.to_owned()).or_default();
        known.retain(|_, (said, at)| now.saturating_duration_since(*at) <= said.timeout);
        let mut news = false;
        for reported in devices {
            let Some(device) = reported.device.clone() else { continue };
            let key = (device.pool_name, device.device_name);
            let said = Said::of(&reported);
            let before = known.get(&key);
            if before.is_none() && known.len() >= MAX_DEVICES {
                debug!(driver, "more devices than are kept");
                break;
            }
            news |= before.is_none_or(|(before, _)| *before != said);
            known.insert(key, (said, now));
        }
        drop(drivers);
        if news {
            self.changed.notify_one();
        }
    }

    /// A driver is gone, or says nothing any more.
    pub(crate) fn forget(&self, driver: &str) {
        if self.drivers.lock().remove(driver).is_some() {
            self.changed.notify_one();
        }
    }

    /// Listens to a driver for as long as this is polled, if it tells of health at all.
    pub(crate) async fn follow(self: Arc<Self>, driver: String, channel: Channel) {
        let mut backoff = Backoff::new(RETRY_BASE, RETRY_CAP);
        loop {
            let mut client = DraResourceHealthClient::new(channel.clone());
            match client.node_watch_resources(pb::NodeWatchResourcesRequest {}).await {
                Ok(answer) => {
                    info!(driver, "the driver tells of its devices' health");
                    let mut stream = answer.into_inner();
                    while let Ok(Some(said)) = stream.message().await {
                        backoff.reset();
                        self.take(&driver, said.devices, Instant::now());
                    }
                    self.forget(&driver);
                }
                Err(status) if status.code() == tonic::Code::Unimplemented => return,
                Err(status) => debug!(driver, error = status.message(), "the driver does not tell of health"),
            }
            tokio::time::sleep(backoff.next_wait()).await;
        }
    }
}

impl Said {
    fn of(reported: &pb::DeviceHealth) -> Said {
        let seconds = u64::try_from(reported.health_check_timeout_seconds).unwrap_or(0);
        let timeout = if seconds == 0 { DEFAULT_TIMEOUT } else { Duration::from_secs(seconds) };
        let mut message = reported.message.clone();
        if message.chars().count() > MAX_MESSAGE_CHARS {
            message = message.chars().take(MAX_MESSAGE_CHARS - 3).chain("...".chars()).collect();
        }
        Said { health: reported.health(), message, timeout }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(device: &str, health: HealthStatus, timeout: i64) -> pb::DeviceHealth {
        pb::DeviceHealth {
            device: Some(pb::DeviceIdentifier { pool_name: "p".into(), device_name: device.into() }),
            health: health.into(),
            health_check_timeout_seconds: timeout,
            message: "m".repeat(2000),
            ..Default::default()
        }
    }

    #[test]
    fn what_was_said_counts_for_a_while() {
        let healths = Healths::default();
        let start = Instant::now();
        let of = |device: &str, after: u64| {
            healths.of("d", "p", device, "id".into(), start + Duration::from_secs(after)).health.unwrap()
        };
        assert_eq!(of("a", 0), "Unknown");
        let devices = vec![said("a", HealthStatus::Unhealthy, 0), said("b", HealthStatus::Healthy, 100)];
        healths.take("d", devices, start);
        assert_eq!((of("a", 30), of("b", 30)), ("Unhealthy".to_owned(), "Healthy".to_owned()));
        assert_eq!((of("a", 31), of("b", 31)), ("Unknown".to_owned(), "Healthy".to_owned()));
        let message = healths.of("d", "p", "a", "id".into(), start).message.unwrap();
        assert!(message.len() == MAX_MESSAGE_CHARS && message.ends_with("m..."));
        healths.forget("d");
        assert_eq!(of("b", 0), "Unknown");
    }

    #[tokio::test]
    async fn only_news_is_told() {
        let healths = Healths::default();
        let now = Instant::now();
        let news = |health| {
            let told = healths.changed.notified();
            tokio::pin!(told);
            told.as_mut().enable();
            healths.take("d", vec![said("a", health, 0)], now);
            futures::FutureExt::now_or_never(told).is_some()
        };
        assert_eq!(
            (news(HealthStatus::Healthy), news(HealthStatus::Healthy), news(HealthStatus::Unhealthy)),
            (true, false, true)
        );
    }
}
