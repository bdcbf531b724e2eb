//! What the kubelet reports of its pods: `generate` makes a status from plain data, `manager` writes it to the API.

pub mod containers;
pub mod generate;
pub mod manager;
mod patch;

pub use generate::{Ended, Input, Resize, generate};
pub use manager::StatusManager;
