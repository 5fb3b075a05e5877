//! Every preset beyond the four providers of the demo: what its API says, and how the preset closes what it leaves
//! open.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../support/mod.rs"]
mod support;

mod adyen;
mod aip_155;
mod bench;
mod gocardless;
mod oasis;
mod paypal;
mod square;
mod stripe;
mod svix;
