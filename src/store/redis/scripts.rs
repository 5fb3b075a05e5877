//! The steps that look at a record before they change it. The server runs each as one step.
//!
//! The offsets are those of the [record](super::record): version 1, state 2, owner 3 to 18, fence 19 to 26, retention
//! 27 to 34, counted from 1 as Lua does. A record of another version is never changed.
//!
//! `allow-oom` lets a step run on a server that is full: without it nobody could say there that an attempt is over.

use redis::Script;

use super::record::{ABANDONED, COMPLETED, HEAD, IN_PROGRESS};

/// What the script of a claim found and did, first in its answer.
pub(super) const FOUND: i64 = 0;
pub(super) const FIRST: i64 = 1;
pub(super) const TAKEN_OVER: i64 = 2;
/// The record was the owner's own, and its lease is renewed.
pub(super) const OWN: i64 = 3;
/// It is vacant, and was not to be acquired.
pub(super) const VACANT: i64 = 4;

/// What a script that changes a record answers.
pub(super) const NOT_OWNED: i64 = 0;
pub(super) const CHANGED: i64 = 1;

/// Each is sent by its hash, and in full to a server that does not know it yet.
pub(super) struct Scripts {
    pub(super) begin: Step,
    pub(super) complete: Step,
    pub(super) complete_without_answer: Step,
    pub(super) renew: Step,
    pub(super) release: Step,
    pub(super) abandon: Step,
}

pub(super) struct Step {
    pub(super) code: String,
    pub(super) hash: String,
}

impl Scripts {
    /// In a cluster changes are published on the record's node alone.
    pub(super) fn new(is_cluster: bool) -> Self {
        let wake = if is_cluster { WAKE_IN_A_CLUSTER } else { WAKE };
        let step = |flags, body| step(flags, wake, body);
        Self {
            begin: step(ALLOW_OOM, BEGIN),
            complete: step("", COMPLETE),
            complete_without_answer: step(ALLOW_OOM, COMPLETE),
            renew: step(ALLOW_OOM, RENEW),
            release: step(ALLOW_OOM, RELEASE),
            abandon: step(ALLOW_OOM, ABANDON),
        }
    }
}

const ALLOW_OOM: &str = " flags=allow-oom";

fn step(flags: &str, wake: &str, body: &str) -> Step {
    let code = format!(
        "#!lua{flags}\n\
         local IN_PROGRESS, ABANDONED, COMPLETED, HEAD = {IN_PROGRESS}, {ABANDONED}, {COMPLETED}, {HEAD}\n\
         local FOUND, FIRST, TAKEN_OVER, OWN, VACANT = {FOUND}, {FIRST}, {TAKEN_OVER}, {OWN}, {VACANT}\n\
         local NOT_OWNED, CHANGED = {NOT_OWNED}, {CHANGED}\n\
         {COMMON}{wake}{body}"
    );
    let hash = Script::new(&code).get_hash().to_owned();
    Step { code, hash }
}

const COMMON: &str = r"
local key = KEYS[1]
local function state_if_owned_by(owner)
    local head = redis.call('GETRANGE', key, 0, HEAD - 1)
    if #head < HEAD or head:byte(1) ~= 1 or head:sub(3, 18) ~= owner then return nil, head end
    return head:byte(2), head
end
local function keep(value) return struct.unpack('<I8', value, 27) end
local function expire(millis) redis.call('PEXPIRE', key, string.format('%.0f', millis)) end
local function write_again(state) redis.call('SETRANGE', key, 1, string.char(state)) end
";

/// `pcall`: a server that lets nobody publish has changed the record all the same.
const WAKE: &str = r"
local function wake()
    local listeners = redis.pcall('PUBSUB', 'NUMSUB', key)
    if listeners[2] and listeners[2] > 0 then redis.pcall('PUBLISH', key, '') end
end
";
const WAKE_IN_A_CLUSTER: &str = r"
local function wake()
    local listeners = redis.pcall('PUBSUB', 'SHARDNUMSUB', key)
    if listeners[2] and listeners[2] > 0 then redis.pcall('SPUBLISH', key, '') end
end
";

/// ARGV: the record to set if it is vacant, its time to live, the lease, the owner; the name of the lease to take over
/// and the record to set then, or two empty strings; 1 if a vacant record may be acquired.
const BEGIN: &str = r"
local value = redis.call('GET', key)
if not value then
    if ARGV[7] ~= '1' then return {VACANT} end
    redis.call('SET', key, ARGV[1], 'PX', ARGV[2])
    return {FIRST}
end
local left = redis.call('PTTL', key)
local state = value:byte(2)
if #value ~= HEAD or value:byte(1) ~= 1 or left < 0 then return {FOUND, value, left} end
if state == IN_PROGRESS and value:sub(3, 18) == ARGV[4] then
    expire(ARGV[3] + keep(value))
    return {OWN, value}
end
local over = state == ABANDONED or state == IN_PROGRESS and left < keep(value)
if over and value:sub(3, 26) == ARGV[5] then
    redis.call('SET', key, ARGV[6], 'PX', ARGV[2])
    return {TAKEN_OVER}
end
return {FOUND, value, left}
";

/// ARGV: the owner, the answer with its checksum, its time to live or an empty string.
///
/// What was changed by an earlier try, whose answer was lost, is written again: a server that is asked what replicas
/// have acknowledged may count what this connection wrote, and the first try's may have been another one.
const COMPLETE: &str = r"
local state, head = state_if_owned_by(ARGV[1])
if state == COMPLETED then
    write_again(state)
    return CHANGED
end
if state ~= IN_PROGRESS and state ~= ABANDONED then return NOT_OWNED end
local completed = head:sub(1, 1) .. string.char(COMPLETED) .. head:sub(3) .. ARGV[2]
if ARGV[3] == '' then
    redis.call('SET', key, completed)
else
    redis.call('SET', key, completed, 'PX', ARGV[3])
end
wake()
return CHANGED
";

/// ARGV: the owner, the lease. What was abandoned stays so: a renewal that was late must not revive it.
const RENEW: &str = r"
local state, head = state_if_owned_by(ARGV[1])
if state ~= IN_PROGRESS then return NOT_OWNED end
expire(ARGV[2] + keep(head))
return CHANGED
";

/// ARGV: the owner.
const RELEASE: &str = r"
local state = state_if_owned_by(ARGV[1])
if state ~= IN_PROGRESS and state ~= ABANDONED then return NOT_OWNED end
redis.call('DEL', key)
wake()
return CHANGED
";

/// ARGV: the owner.
const ABANDON: &str = r"
local state, head = state_if_owned_by(ARGV[1])
if state == ABANDONED then
    write_again(state)
    return CHANGED
end
if state ~= IN_PROGRESS then return NOT_OWNED end
redis.call('SETRANGE', key, 1, string.char(ABANDONED))
expire(keep(head))
wake()
return CHANGED
";
