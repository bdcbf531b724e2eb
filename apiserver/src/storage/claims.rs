//! Claims: keys that only one writer can make, which lapse if it dies. They guard what is given out (node ports) for as long
//! as a write takes.

use super::Store;
use super::etcd::Swap;
use apimachinery::status::StatusError;

// === impl Store ===

impl Store {
    /// Claims a name. Gives the revision of the claim; None if another has it.
    pub async fn claim(&self, name: &str, owner: &str, seconds: i64) -> Result<Option<i64>, StatusError> {
        let lease = self.etcd.lease(seconds).await?;
        match self.etcd.put(&self.claim_key(name), owner.as_bytes(), 0, lease).await? {
            Swap::Done { revision } => Ok(Some(revision)),
            Swap::Differs(_) => Ok(None),
        }
    }

    /// Gives back a claim that was made at this revision.
    pub async fn unclaim(&self, name: &str, revision: i64) -> Result<(), StatusError> {
        self.etcd.delete(&self.claim_key(name), revision).await?;
        Ok(())
    }

    fn claim_key(&self, name: &str) -> String {
        format!("{}/pilothouse/claims/{name}", self.root)
    }
}
