//! # The problem types
//!
//! A request that is refused is answered with a problem document (RFC 9457) whose `type` leads here. What each means
//! to the client, and whether to send the request again. The statuses are those that a layer has by default; an API may
//! have others, and a form of its own, in which these names stand for its codes.
//!
//! A gRPC call is refused with a status of its own in place of these, under HTTP status 200, and with the reason in
//! `grpc-message`; where trying again can help, `retry-after` stands beside them.
//!
//! | `grpc-status` | what it refuses |
//! |---|---|
//! | 3, `INVALID_ARGUMENT` | `idempotency-key-missing`, `idempotency-key-invalid`, `idempotency-scope-missing`, `request-body-incomplete`, `request-body-unreadable`, `idempotency-key-repeated`, `first-sent-invalid`, `idempotency-key-reused` |
//! | 6, `ALREADY_EXISTS` | `duplicate-request`, `response-not-kept` |
//! | 8, `RESOURCE_EXHAUSTED` | `request-body-too-large` |
//! | 9, `FAILED_PRECONDITION` | `first-sent-too-old`, `outcome-unknown` |
//! | 10, `ABORTED` | `request-in-progress`, `transaction-rolled-back` |
//! | 13, `INTERNAL` | `transaction-failed`, `transaction-misused` |
//! | 14, `UNAVAILABLE` | `store-unavailable`, `store-full`, `record-from-newer-version` |
//! | 15, `DATA_LOSS` | `record-unreadable` |
//!
//! ## idempotency-key-missing
//! **400.** The operation requires an idempotency key and none was sent. Nothing ran. Send the request with a key.
//!
//! ## idempotency-key-invalid
//! **400.** The key is empty, too long, has characters that are not taken, is not a well-formed structured field
//! string, or was sent more than once; `detail` says which. Nothing ran. Correct the key.
//!
//! ## idempotency-scope-missing
//! **400.** The server could not tell whom the key belongs to: nobody is named, or the credentials do not clearly name
//! one. Nothing ran. Correct the credentials.
//!
//! ## request-body-too-large
//! **413.** The body is over the limit for requests that have a key, or whose key may be in the body or is made of it.
//! Nothing ran.
//!
//! ## request-body-incomplete
//! **400.** The body broke off. Nothing ran. Send the request again.
//!
//! ## request-body-unreadable
//! **400.** The key, or what makes two requests the same, is in the JSON body, and the body cannot be read in one way
//! only: it is not JSON, nests too deep, or has an object with two members of one name; `detail` says where. Nothing
//! ran.
//!
//! ## idempotency-key-repeated
//! **400.** The request claims several keys and two at one place of its body are equal. Nothing ran. Give each a value
//! of its own.
//!
//! ## first-sent-invalid
//! **400.** The request does not say when it was sent first, or not as an HTTP date of the past. Nothing ran.
//!
//! ## first-sent-too-old
//! **412.** The request was sent first so long ago that its record may be gone: it might run again, so it did not run.
//! Find out by other means whether it was executed.
//!
//! ## duplicate-request
//! **409.** The request has no key and is the same as an earlier one that was executed. This one did not run. If it is
//! meant as another operation, send it with a key.
//!
//! ## idempotency-key-reused
//! **422.** The key was used for a different request: another method, path, query or body. Or one of several keys of
//! the request belongs to another operation. This request did not run.
//! Use a new key for a new operation.
//!
//! ## request-in-progress
//! **409.** The first request with this key is still running. Send the request again after `Retry-After`.
//!
//! ## outcome-unknown
//! **409.** The first request with this key ended without a known outcome, and is not run again while the
//! server remembers it: it may have had its effect. Find out by other means; sending it again does not help.
//!
//! ## response-not-kept
//! **409.** The operation is done. Its answer, of status `original_status`, was a stream or was too large to keep, or
//! the store had no room for it, or the server does not keep answers of its kind.
//! Sending it again does not help.
//!
//! ## store-unavailable
//! **503.** The server cannot reach its records, so it does not know whether the request is a duplicate. It did not
//! run; or, where `detail` says so, it is not known whether what it did was committed. Send the request again after
//! `Retry-After`.
//!
//! ## store-full
//! **503.** The server has no room for another key. The request did not run. Send it again after `Retry-After`.
//!
//! ## record-unreadable
//! **500.** The record of the first request is damaged, or sealed with a key that the server does not have. This request
//! did not run, and will not.
//!
//! ## record-from-newer-version
//! **503.** The record of the first request was written by a newer version of the server. This request did not run.
//! Send it again after `Retry-After`: it may reach a server that can read it.
//!
//! ## transaction-rolled-back
//! **503.** The request ran, but its transaction was rolled back: it was in conflict with another one, or the server's
//! database could not be reached. Nothing of it happened. Send it again after `Retry-After`.
//!
//! ## transaction-failed
//! **500.** The request ran, but what it wrote could not be committed. Nothing of it happened, and its key is free.
//!
//! ## transaction-misused
//! **500.** The request ran, but its handler ended the transaction itself or did not give it back. This is a fault of
//! the server's. What is known of the request's outcome is said to the next one with the same key.
