-- What the journals of a run are loaded into. Times are milliseconds of the server's clock unless named otherwise.

-- Messages of the log.
create table msg (
    seq bigint, time_ms bigint, namespace varchar, kind varchar, writer varchar, term varchar, epoch bigint,
    events integer, hash ubigint, live_hash ubigint, canary boolean
);
-- Events, with what the fold made of each. `term` of msg is the writer's nonce: a new one for each term of a leader.
-- `pos` is seq and idx as one number. `ends` says that this event ended its task; `about` is what a decision or answer refers to.
create table ev (
    pos bigint, seq bigint, idx integer, time_ms bigint, kind varchar, actor varchar, task varchar, attempt integer,
    incarnation bigint, epoch bigint, basis bigint, verdict varchar, reason varchar, error varchar,
    ends boolean, suspect boolean, run_us bigint, retryable boolean, about_seq bigint, about_idx integer
);
-- Submissions: of tasks, and of workflows as a whole.
create table submitted (
    seq bigint, idx integer, client varchar, n bigint, task varchar, verdict varchar, reason varchar,
    is_workflow boolean
);
-- Tasks that were accepted, those of workflows included.
create table task (
    task varchar, seq bigint, idx integer, workflow varchar, runs varchar, max_attempts integer,
    backoff_ms double, backoff_factor double, backoff_ms_max double, jitter double, timeout_ms bigint, cpu double
);
create table dep (task varchar, upstream varchar);
-- Tasks that ended without an event of their own: skipped, because of the event at seq, idx.
create table skipped (task varchar, pos bigint);
-- Workflows that ended, by the fold.
create table workflow_ended (workflow varchar, state varchar);
-- Incarnations of workers.
create table worker (name varchar, incarnation bigint, slots integer, ahead integer, cpu double, pid bigint);
-- Locks, as their holders speak of them.
create table lock (
    pos bigint, kind varchar, name varchar, token bigint, holder varchar, mode varchar, permits bigint,
    verdict varchar
);
-- The client journal: every number a client used, and how handing it over went (ok, fail, unknown).
create table sub (client varchar, n bigint, kind varchar, result varchar, task varchar);
-- What clients were told of ends; state empty: never, although they waited.
create table told (client varchar, n bigint, task varchar, state varchar, pos bigint);
-- The side-effect journal. `pos` is the place in the file; `what` begin, end or write.
create table fx (
    pos bigint, what varchar, task varchar, attempt integer, worker varchar, pid bigint, mono_ns bigint,
    token bigint
);
-- What masters answered when asked, and what the audit's fold says of the same position.
create table answer (
    master varchar, seq bigint, task varchar, state varchar, end_seq bigint, end_idx integer,
    fold_state varchar, fold_seq bigint, fold_idx integer
);
-- The stream, looked at again and again.
create table identity (number integer, name varchar, created_ns bigint, first_seq bigint, last_seq bigint);
create table liveness (what varchar, ok boolean, detail varchar);
create table exited (node varchar, pid bigint, code integer, ready boolean, by_us boolean);
create table object (seq bigint, name varchar, wrong varchar);
-- Files beside the log in which the planted secret was looked for.
create table file (name varchar, canary boolean);
create table fault (number integer, family varchar, kind varchar, target varchar, hit varchar);
-- Each table of each history that a master kept; wrong empty: it is what the log says.
create table history (folder varchar, name varchar, found bigint, wrong varchar);
-- What this run contained: kinds of load and of faults. Queries that need what it did not may find no rows.
create table part (name varchar);
-- The end of the fold: parts of its state that must be empty once all is quiet.
create table rest (what varchar, size bigint);
