//! What every Pilothouse daemon shares about running: flags, logs, the client, informers, serving, metrics, leader
//! election, events.

pub mod auth;
pub mod backoff;
pub mod batched;
pub mod cidr;
pub mod cli;
pub mod client;
pub mod command;
pub mod daemon;
pub mod events;
pub mod feature_gates;
pub mod informer;
pub mod leader_election;
pub mod lean;
mod memory;
pub mod metrics;
pub mod nftables;
pub mod pem;
pub mod serving;
pub mod streams;
pub mod tls;
pub mod transport;
pub mod watch;
pub mod x509;
