//! How full the volumes of claims are: as their drivers say, where these measure, else as their file systems have it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::Volumes;
use crate::usage::Measured;

impl Volumes {
    /// Asks drivers once in a `period` (none: never), also whether something is wrong where `conditions` are wanted. As the
    /// `volumeStatCalculator`.
    pub async fn keep_measuring(
        self: Arc<Self>,
        root_dir: PathBuf,
        period: Duration,
        conditions: bool,
        shutdown: CancellationToken,
    ) {
        let Some(csi) = self.csi.clone().filter(|_| !period.is_zero()) else { return };
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(period) => {}
            }
            let uids: BTreeSet<String> = self.claimed.lock().keys().map(|(uid, _)| uid.clone()).collect();
            let mut all = BTreeMap::new();
            for uid in uids {
                all.extend(csi.measure(&uid, &root_dir.join("pods").join(&uid), conditions).await);
            }
            *self.by_drivers.lock() = all;
        }
    }

    /// How full a claim's volume is. None: it is a directory of the host's own, or a device of which nobody says.
    pub fn measured(&self, uid: &str, volume: &str) -> Option<Measured> {
        let (path, device) = self.claimed_at(uid, volume)?;
        let by_driver = self.by_drivers.lock().get(&path).copied();
        by_driver.or_else(|| if device { None } else { Measured::at(&path) })
    }

    /// Where a claim's volume is, and whether it is a device.
    fn claimed_at(&self, uid: &str, volume: &str) -> Option<(PathBuf, bool)> {
        let claimed = self.claimed.lock();
        let source = claimed.get(&(uid.to_owned(), volume.to_owned()))?;
        let own = source.path.components().any(|part| part.as_os_str() == uid);
        (own || source.device).then(|| (source.path.clone(), source.device))
    }
}

#[cfg(test)]
mod tests {
    use super::super::MountSource;
    use super::*;

    #[test]
    fn claims_are_looked_at_where_they_are_mounted() {
        let root = tempfile::tempdir().expect("a directory");
        let data = root.path().join("pods/u/volumes/kubernetes.io~csi/pv/mount");
        std::fs::create_dir_all(&data).expect("made");
        let volumes = Volumes::new(None, "n1");
        let mut claimed = volumes.claimed.lock();
        let mut put = |volume: &str, path: PathBuf, device| {
            let source = MountSource { path, device, ..Default::default() };
            claimed.insert(("u".to_owned(), volume.to_owned()), source);
        };
        put("data", data.clone(), false);
        put("raw", "/k/volumeDevices/pv/dev/u".into(), true);
        put("host", "/srv/data".into(), false);
        drop(claimed);
        assert_eq!(volumes.measured("u", "data").map(|found| found.all.bytes > 0), Some(true));
        assert_eq!(["raw", "host", "none"].map(|volume| volumes.measured("u", volume)), [None; 3]);
        // What the driver says counts, of devices too.
        let full = Measured {
            free: Default::default(),
            all: Default::default(),
            used: Default::default(),
            abnormal: Some(true),
        };
        volumes.by_drivers.lock().extend([(data, full), ("/k/volumeDevices/pv/dev/u".into(), full)]);
        assert_eq!(["data", "raw"].map(|volume| volumes.measured("u", volume)), [Some(full); 2]);
    }
}
