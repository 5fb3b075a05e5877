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
    pub(super) complete_many: Step,
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
        Self {
            begin: step(ALLOW_OOM, &[BEGIN]),
            complete: step("", &[OWNED, COMPLETE, wake]),
            complete_without_answer: step(ALLOW_OOM, &[OWNED, COMPLETE, wake]),
            complete_many: of_code(COMPLETE_MANY.to_owned()),
            renew: step(ALLOW_OOM, &[OWNED, RENEW]),
            release: step(ALLOW_OOM, &[OWNED, RELEASE, wake]),
            abandon: step(ALLOW_OOM, &[OWNED, ABANDON, wake]),
        }
    }
}

const ALLOW_OOM: &str = " flags=allow-oom";

/// In one piece: a function of its own would be made at each run.
fn step(flags: &str, parts: &[&str]) -> Step {
    let body = parts.concat();
    let code = format!(
        "#!lua{flags}\n\
         local IN_PROGRESS, ABANDONED, COMPLETED, HEAD = {IN_PROGRESS}, {ABANDONED}, {COMPLETED}, {HEAD}\n\
         local FOUND, FIRST, TAKEN_OVER, OWN, VACANT = {FOUND}, {FIRST}, {TAKEN_OVER}, {OWN}, {VACANT}\n\
         local NOT_OWNED, CHANGED = {NOT_OWNED}, {CHANGED}\n\
         local key = KEYS[1]\n\
         local value = redis.call('GET', key)\n\
         {body}"
    );
    of_code(code)
}

fn of_code(code: String) -> Step {
    let hash = Script::new(&code).get_hash().to_owned();
    Step { code, hash }
}

/// Each call costs as much as a command, so the record is read by one: in progress it is as short as its head.
const OWNED: &str = r"
if not value or #value < HEAD or value:byte(1) ~= 1 or value:sub(3, 18) ~= ARGV[1] then return NOT_OWNED end
local state = value:byte(2)
";

/// Ends a step. `pcall`: a server that lets nobody publish has changed the record all the same.
const WAKE: &str = r"
local listeners = redis.pcall('PUBSUB', 'NUMSUB', key)
if listeners[2] and listeners[2] > 0 then redis.pcall('PUBLISH', key, '') end
return CHANGED
";
const WAKE_IN_A_CLUSTER: &str = r"
local listeners = redis.pcall('PUBSUB', 'SHARDNUMSUB', key)
if listeners[2] and listeners[2] > 0 then redis.pcall('SPUBLISH', key, '') end
return CHANGED
";

/// ARGV: the record to set if it is vacant, its time to live, the lease, the owner; the name of the lease to take over
/// and the record to set then, or two empty strings; 1 if a vacant record may be acquired.
const BEGIN: &str = r"
if not value then
    if ARGV[7] ~= '1' then return {VACANT} end
    redis.call('SET', key, ARGV[1], 'PX', ARGV[2])
    return {FIRST}
end
local left = redis.call('PTTL', key)
local state = value:byte(2)
if #value ~= HEAD or value:byte(1) ~= 1 or left < 0 then return {FOUND, value, left} end
local keep = struct.unpack('<I8', value, 27)
if state == IN_PROGRESS and value:sub(3, 18) == ARGV[4] then
    redis.call('PEXPIRE', key, string.format('%.0f', ARGV[3] + keep))
    return {OWN, value}
end
local over = state == ABANDONED or state == IN_PROGRESS and left < keep
if over and value:sub(3, 26) == ARGV[5] then
    redis.call('SET', key, ARGV[6], 'PX', ARGV[2])
    return {TAKEN_OVER}
end
return {FOUND, value, left}
";

/// ARGV: the owner, the answer with its checksum, its time to live or an empty string.
///
/// What was changed by an earlier try, whose answer was lost, is written again: a server that is asked what replicas
/// have acknowledged may count what this connection wrote, and the first try's may have been another one. And those who
/// listen are woken: the first try may have ended before it told them.
const COMPLETE: &str = r"
if state == COMPLETED then
    redis.call('SETRANGE', key, 1, string.char(COMPLETED))
elseif state ~= IN_PROGRESS and state ~= ABANDONED then
    return NOT_OWNED
else
    local completed = string.char(1, COMPLETED) .. value:sub(3, HEAD) .. ARGV[2]
    if ARGV[3] == '' then
        redis.call('SET', key, completed)
    else
        redis.call('SET', key, completed, 'PX', ARGV[3])
    end
end
";

/// Completions that came at once, each as the simplest case alone: the record is as its claim set it. Answers a number for
/// each key, and 0 says nothing of it but that nothing was changed.
///
/// ARGV: for each key the record in progress, the completed one, its time to live or an empty string; behind them the
/// channel that is listened to while any other is.
///
/// A long string costs a script more than its other steps, so the record comes whole and is not put together here. Of
/// those, commands cost most: so one reads all records, where the account may use it, and listeners are counted by record
/// only where there are any.
const COMPLETE_MANY: &str = r"#!lua
local found = redis.pcall('MGET', unpack(KEYS))
if found.err then
    found = {}
    for i, key in ipairs(KEYS) do found[i] = redis.pcall('GET', key) end
end
local done = {}
for i, key in ipairs(KEYS) do
    local at = 3 * i
    done[i] = 0
    if found[i] == ARGV[at - 2] then
        local set
        if ARGV[at] == '' then
            set = redis.pcall('SET', key, ARGV[at - 1])
        else
            set = redis.pcall('SET', key, ARGV[at - 1], 'PX', ARGV[at])
        end
        if set.ok then done[i] = 1 end
    end
end
if #KEYS > 1 then
    local any = redis.pcall('PUBSUB', 'NUMSUB', ARGV[3 * #KEYS + 1])
    if any[2] == 0 then return done end
end
local listeners = redis.pcall('PUBSUB', 'NUMSUB', unpack(KEYS))
for i = 2, #listeners, 2 do
    if listeners[i] > 0 then redis.pcall('PUBLISH', listeners[i - 1], '') end
end
return done
";

/// ARGV: the owner, the lease. What was abandoned stays so: a renewal that was late must not revive it.
const RENEW: &str = r"
if state ~= IN_PROGRESS then return NOT_OWNED end
redis.call('PEXPIRE', key, string.format('%.0f', ARGV[2] + struct.unpack('<I8', value, 27)))
return CHANGED
";

/// ARGV: the owner.
const RELEASE: &str = r"
if state ~= IN_PROGRESS and state ~= ABANDONED then return NOT_OWNED end
redis.call('DEL', key)
";

/// ARGV: the owner. Written again for the reason above.
const ABANDON: &str = r"
if state == ABANDONED then
    redis.call('SETRANGE', key, 1, string.char(ABANDONED))
    return CHANGED
end
if state ~= IN_PROGRESS then return NOT_OWNED end
redis.call('SETRANGE', key, 1, string.char(ABANDONED))
redis.call('PEXPIRE', key, string.format('%.0f', struct.unpack('<I8', value, 27)))
";
