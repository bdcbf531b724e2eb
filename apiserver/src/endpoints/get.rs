//! GET of one object.

use super::{Outcome, ResourceRequest};
use apimachinery::status::StatusError;

/// Without a resourceVersion the newest; with one (0: any), one that is not older.
pub async fn get(request: &ResourceRequest<'_>) -> Result<Outcome, StatusError> {
    let store = &request.context.store;
    match request.info.query.get("resourceVersion") {
        "" => store.wait_for(None).await?,
        "0" => 0,
        text => store.wait_for(Some(parse_version(text)?)).await?,
    };
    let object = store.get_cached(request.resource, request.namespace(), &request.info.name)?;
    Ok(Outcome::stored(200, request.resource, object))
}

/// A resourceVersion as a client gives it.
pub fn parse_version(text: &str) -> Result<i64, StatusError> {
    text.parse::<i64>().ok().filter(|version| *version >= 0).ok_or_else(|| {
        StatusError::bad_request(format!(
            "invalid resource version: resourceVersion: Invalid value: {text:?}: strconv.ParseUint: parsing {text:?}: invalid syntax"
        ))
    })
}
