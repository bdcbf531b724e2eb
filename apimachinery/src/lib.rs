//! What every part of Pilothouse shares about Kubernetes API objects: identifiers, quantities, selectors, names,
//! `Status` errors, schema facts, strict decoding, patches and field management. Nothing here does I/O.
#![forbid(unsafe_code)]

pub mod cel;
pub mod continuation;
pub mod cron;
pub mod decode;
pub mod facts;
pub mod fields;
pub mod json;
pub mod labels;
pub mod managed_fields;
pub mod meta;
pub mod names;
pub mod node;
pub mod patch;
pub mod pod;
pub mod protobuf;
pub mod quantity;
pub mod quota;
pub mod references;
pub mod status;
pub mod time;
pub mod volume;
pub mod yaml;
