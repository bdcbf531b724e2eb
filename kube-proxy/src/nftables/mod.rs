//! The nftables mode: a pure renderer ([`render`]), a pure difference of two rule sets ([`ruleset`]), and `nft` to apply it.
pub mod apply;
pub mod render;
pub mod ruleset;
