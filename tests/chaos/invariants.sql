-- The invariants of a run. Each has a name, what it says, a count of the rows it looks at (`looked`), the part of a
-- run that feeds it (`part`; a run without that part may have no rows), and a query for what breaks it.

-- name: I01_acknowledged_submission_lost
-- What a client was told is stored is in the log, and was accepted (or refused for want of room).
-- part: bulk
-- looked: select count(*) from sub where result = 'ok' and kind not in ('cancel', 'reprioritize', 'conflict', 'poison', 'lock')
select s.client, s.n from sub s
left join submitted t on t.client = s.client and t.n = s.n and (t.verdict = 'applied' or t.reason = 'overloaded')
where s.result = 'ok' and s.kind not in ('cancel', 'reprioritize', 'conflict', 'poison', 'lock') and t.client is null

-- name: I01b_acknowledged_cancellation_lost
-- So is every acknowledged cancellation.
-- part: cancel
-- looked: select count(*) from sub where result = 'ok' and kind = 'cancel'
select s.client, s.n, s.task from sub s where s.result = 'ok' and s.kind = 'cancel' and not exists (
    select 1 from ev e where e.task = s.task and e.kind in ('task.cancel_requested', 'workflow.cancel_requested'))

-- name: I02_phantom_submission
-- Nothing is accepted that no client meant to hand over, or that a client was told is certainly not stored.
-- part: bulk
-- looked: select count(*) from submitted where verdict = 'applied'
select t.seq, t.idx, t.client, t.n from submitted t
left join sub s on s.client = t.client and s.n = t.n and s.result <> 'fail'
where t.verdict = 'applied' and s.client is null

-- name: I03_one_key_two_tasks
-- However often it was handed over, it is one task.
-- part: repeat
-- looked: select count(*) from submitted where verdict in ('applied', 'duplicate')
select client, n, count(*) as times from submitted where verdict = 'applied' group by client, n having count(*) > 1

-- name: I03b_one_id_two_tasks
-- No id is accepted twice.
-- part: always
-- looked: select count(*) from submitted where verdict = 'applied'
select task, count(*) as times from submitted where verdict = 'applied' group by task having count(*) > 1

-- name: I03c_conflict_accepted
-- Another task under the id of one that was acknowledged is refused.
-- part: conflict
-- looked: select count(*) from sub where kind = 'conflict' and result = 'ok'
select t.seq, t.task from submitted t join sub s on s.client = t.client and s.n = t.n
where s.kind = 'conflict' and t.verdict in ('applied', 'duplicate')

-- name: I04_not_exactly_one_end
-- Once all is quiet every accepted task has ended, once.
-- part: always
-- looked: select count(*) from task
select t.task, count(e.task) as ends from task t left join ending e on e.task = t.task
group by t.task having count(e.task) <> 1

-- name: I04b_end_that_ends_nothing
-- What is said to end a task, and was applied, ended it.
-- part: always
-- looked: select count(*) from ev where ends
select seq, idx, kind, task from ev where verdict = 'applied' and not ends
and kind in ('task.completed', 'task.cancelled', 'task.timed_out', 'task.quarantined')

-- name: I05_event_after_end
-- An end is final: nothing about the task is applied after it.
-- part: always
-- looked: select count(*) from ending
select e.seq, e.idx, e.kind, e.task from ev e join ending t on t.task = e.task
where e.verdict = 'applied' and e.pos > t.pos and e.kind in (
    'task.assigned', 'task.started', 'task.completed', 'task.failed', 'task.declined', 'task.retried',
    'task.stop', 'task.timed_out', 'task.cancelled', 'task.quarantined')

-- name: I06_attempts_not_1_to_n
-- Attempts are numbered 1 to n, each assigned once.
-- part: always
-- looked: select count(*) from ev where kind = 'task.assigned' and verdict = 'applied'
select task from ev where kind = 'task.assigned' and verdict = 'applied' group by task
having count(*) <> max(attempt) or min(attempt) <> 1 or count(distinct attempt) <> count(*)

-- name: I07a_word_of_another_attempt_counted
-- What a worker says counts only for the attempt that is assigned to this incarnation, and to nobody later.
-- part: always
-- looked: select count(*) from ev where verdict = 'applied' and kind in ('task.completed', 'task.failed')
select o.seq, o.idx, o.task, o.attempt from ev o
left join ev a on a.task = o.task and a.attempt = o.attempt and a.incarnation = o.incarnation
    and a.kind = 'task.assigned' and a.verdict = 'applied' and a.pos < o.pos
where o.verdict = 'applied' and o.kind in ('task.started', 'task.completed', 'task.failed', 'task.declined')
and a.task is null
union all
select o.seq, o.idx, o.task, o.attempt from ev o join ev a on a.task = o.task
where o.verdict = 'applied' and o.kind in ('task.started', 'task.completed', 'task.failed', 'task.declined')
and a.kind = 'task.assigned' and a.verdict = 'applied' and a.attempt > o.attempt and a.pos < o.pos

-- name: I07b_word_of_the_dead_counted
-- Nothing counts that comes from an incarnation after it was lost, left or was replaced.
-- part: kill worker
-- looked: select count(*) from gone
select o.seq, o.idx, o.task, o.incarnation from ev o join gone g on g.incarnation = o.incarnation
where o.verdict = 'applied' and o.pos > g.pos
and o.kind in ('task.started', 'task.completed', 'task.failed', 'task.declined', 'task.assigned')

-- name: I08a_two_leaders_in_one_epoch
-- Whatever is decided in an epoch is decided by one master, in one term.
-- part: always
-- looked: select count(*) from msg where epoch > 0
select epoch, count(distinct writer || '.' || term) as leaders from msg where epoch > 0
group by epoch having count(distinct writer || '.' || term) > 1

-- name: I08b_deposed_leader_reached_the_log
-- Once somebody else is elected the log itself refuses what the one before decides.
-- part: always
-- looked: select count(*) from msg where epoch > 0 and kind <> 'leader.elected'
select seq, epoch, elected from (
    select seq, kind, epoch, max(case when kind = 'leader.elected' then epoch end) over (
        order by seq rows between unbounded preceding and 1 preceding) as elected
    from msg where epoch > 0)
where kind <> 'leader.elected' and epoch < elected

-- name: I08c_decision_of_another_epoch_counted
-- The fold takes decisions only from the epoch that leads.
-- part: always
-- looked: select count(*) from msg where epoch > 0 and kind <> 'leader.elected'
select m.seq, m.epoch, m.elected from (
    select seq, kind, epoch, max(case when kind = 'leader.elected' then epoch end) over (
        order by seq rows between unbounded preceding and 1 preceding) as elected
    from msg where epoch > 0) m
join ev e on e.seq = m.seq and e.verdict = 'applied'
where m.kind <> 'leader.elected' and m.epoch is distinct from m.elected

-- name: I08d_epochs_not_one_by_one
-- Each election is of the epoch that follows.
-- part: always
-- looked: select count(*) from msg where kind = 'leader.elected'
select seq, epoch, before from (
    select seq, epoch, lag(epoch, 1, 0) over (order by seq) as before from msg where kind = 'leader.elected')
where epoch <> before + 1

-- name: I09a_lock_held_twice
-- As long as somebody can be certain of a lock nobody else gets it, unless both share it.
-- part: lock
-- looked: select count(*) from certain where mode in ('exclusive', 'shared')
select a.name, a.token, a.mode, b.token as other, b.mode as other_mode, a.ended - b.began as ns from certain a
join certain b on b.name = a.name and b.token <> a.token and b.began > a.began and b.began < a.ended
where a.mode in ('exclusive', 'shared') and (a.mode = 'exclusive' or b.mode = 'exclusive')

-- name: I09d_more_holders_than_permits
-- No more can be certain of a semaphore at once than it has permits.
-- part: lock
-- looked: select count(*) from certain where mode = 'semaphore'
select b.name, b.token, count(*) as holders from certain b
join certain a on a.name = b.name and a.began <= b.began and a.ended > b.began
where b.mode = 'semaphore' group by b.name, b.token, b.permits having count(*) > b.permits

-- name: I09e_lower_token_written
-- Where locks guard something, tokens never go back.
-- part: lock
-- looked: select count(*) from fx where what = 'write'
select task as name, pos, token, before from (
    select task, pos, token, max(token) over (
        partition by task order by pos rows between unbounded preceding and 1 preceding) as before
    from fx where what = 'write')
where token < before

-- name: I09b_token_not_rising
-- Each holder of an exclusive lock has a higher token than all before.
-- part: lock
-- looked: select count(*) from lock where kind = 'lock.acquired' and mode = 'exclusive'
select name, pos, token, before from (
    select name, pos, token, max(token) over (
        partition by name order by pos rows between unbounded preceding and 1 preceding) as before
    from lock where kind = 'lock.acquired' and mode = 'exclusive' and verdict = 'applied')
where token <= before

-- name: I09c_write_under_no_token
-- What is written under a lock carries a token that the log gave out.
-- part: lock
-- looked: select count(*) from fx where what = 'write'
select f.pos, f.task, f.token from fx f where f.what = 'write' and not exists (
    select 1 from lock l
    where l.kind = 'lock.acquired' and l.name = f.task and l.token = f.token and l.verdict = 'applied')

-- name: I10_started_before_what_it_depends_on
-- A task of a workflow is assigned only after all that it depends on has completed.
-- part: workflow
-- looked: select count(*) from dep
select e.seq, e.task, d.upstream from ev e join dep d on d.task = e.task
left join ev u on u.task = d.upstream and u.kind = 'task.completed' and u.verdict = 'applied' and u.pos < e.pos
where e.kind = 'task.assigned' and e.verdict = 'applied' and u.task is null

-- name: I11a_masters_know_otherwise
-- What any master ever answered is what the log says at the position it had folded.
-- part: always
-- looked: select count(*) from answer
select master, seq, task, state, fold_state from answer
where state is distinct from fold_state or end_seq is distinct from fold_seq or end_idx is distinct from fold_idx

-- name: I11b_something_left_at_rest
-- Once all is quiet the fold holds no task, wish, answer or announcement that waits for anything.
-- part: always
-- looked: select count(*) from rest
select what, size from rest where size <> 0

-- name: I12a_not_exactly_one_verdict
-- Each event of each message was judged, once.
-- part: always
-- looked: select count(*) from msg
select m.seq, m.events, count(e.seq) as judged from msg m left join ev e on e.seq = m.seq and e.verdict is not null
group by m.seq, m.events having count(e.seq) <> m.events

-- name: I12b_node_spoke_nonsense
-- What is quarantined was written by those who were meant to write nonsense.
-- part: poison
-- looked: select count(*) from ev where verdict in ('quarantined', 'rejected') and actor = 'poison'
select seq, idx, kind, actor, reason from ev where verdict = 'quarantined' and actor <> 'poison'

-- name: I12c_rejection_not_answered
-- Every rejection is answered in the log, once.
-- part: conflict
-- looked: select count(*) from ev where verdict = 'rejected'
select e.seq, e.idx, e.reason, count(a.seq) as answers from ev e
left join ev a on a.kind = 'event.rejected' and a.verdict = 'applied' and a.about_seq = e.seq and a.about_idx = e.idx
where e.verdict = 'rejected' group by e.seq, e.idx, e.reason having count(a.seq) <> 1

-- name: I12d_sound_submission_rejected
-- Clients are refused only what they asked for to be refused, or for want of room.
-- part: always
-- looked: select count(*) from submitted where client <> 'poison'
select t.seq, t.idx, t.client, t.n, t.reason from submitted t
left join sub s on s.client = t.client and s.n = t.n and s.kind = 'conflict'
where t.verdict in ('rejected', 'quarantined') and t.client <> 'poison' and t.reason <> 'overloaded'
and s.client is null

-- name: I13a_gap_in_the_log
-- Sequences follow one another, from 1 on.
-- part: always
-- looked: select count(*) from msg
select seq, before from (select seq, lag(seq, 1, 0) over (order by seq) as before from msg) where seq <> before + 1

-- name: I13b_log_changed_after_it_was_read
-- Read live and read again, the chain of hashes is the same at every message.
-- part: always
-- looked: select count(*) from msg where live_hash is not null
select seq, hash, live_hash from msg where live_hash is distinct from hash

-- name: I13c_another_log
-- It is the same stream all the time.
-- part: always
-- looked: select count(*) from identity
select count(distinct created_ns) as streams from identity
having count(distinct created_ns) > 1 or count(distinct name) > 1

-- name: I13d_master_ahead_of_the_log
-- Nobody has folded what the log does not hold.
-- part: always
-- looked: select count(*) from answer
select master, seq from answer where seq > (select max(seq) from msg)

-- name: I13e_log_went_back
-- It only grows, at its end.
-- part: always
-- looked: select count(*) from identity
select number, first_seq, last_seq, before from (
    select number, first_seq, last_seq, max(last_seq) over (
        order by number rows between unbounded preceding and 1 preceding) as before from identity)
where last_seq < before or (first_seq <> 1 and last_seq > 0)

-- name: I15a_another_namespace
-- All that lies in a namespace's log is about that namespace.
-- part: always
-- looked: select count(*) from msg
select seq, namespace from msg where namespace <> 'chaos'

-- name: I15b_worker_spoke_for_another
-- A worker's word counts only for its own incarnation.
-- part: always
-- looked: select count(*) from ev where verdict = 'applied' and kind = 'task.completed'
select e.seq, e.idx, e.actor, w.name from ev e left join worker w on w.incarnation = e.incarnation
where e.verdict = 'applied' and e.kind in ('task.started', 'task.completed', 'task.failed', 'task.declined')
and e.actor is distinct from w.name

-- name: I16a_assigned_after_cancelled
-- What is cancelled is assigned to nobody.
-- part: cancel
-- looked: select count(*) from ev where kind = 'task.cancelled' and verdict = 'applied'
select a.seq, a.idx, a.task from ev a join ev c on c.task = a.task and c.kind = 'task.cancelled'
where c.verdict = 'applied' and a.kind = 'task.assigned' and a.verdict = 'applied' and a.pos > c.pos

-- name: I16b_assigned_although_known_to_be_unwanted
-- A leader that has folded a wish to cancel assigns the task no more.
-- part: cancel
-- looked: select count(*) from ev where kind = 'task.cancel_requested' and verdict = 'applied'
select a.seq, a.idx, a.task from ev a join ev c on c.task = a.task and c.kind = 'task.cancel_requested'
where c.verdict = 'applied' and a.kind = 'task.assigned' and a.verdict = 'applied' and a.basis >= c.seq

-- name: I17a_too_many_attempts
-- A task fails at most as often as it may be tried.
-- part: flaky
-- looked: select count(*) from ev where kind = 'task.failed' and verdict = 'applied'
select e.task, count(*) as failures, any_value(t.max_attempts) as most from ev e join task t on t.task = e.task
where e.kind = 'task.failed' and e.verdict = 'applied' and e.error <> 'stopped'
group by e.task having count(*) > any_value(t.max_attempts)

-- name: I17b_tried_again_too_soon
-- Between a failure and the next try lies the backoff, less at most its jitter (and 3 ms of rounding).
-- part: flaky
-- looked: select count(*) from ev where kind = 'task.retried' and verdict = 'applied'
with failure as (
    select task, attempt, time_ms, row_number() over (partition by task order by pos) as number
    from ev where kind = 'task.failed' and verdict = 'applied' and error <> 'stopped')
select r.seq, r.task, r.time_ms - f.time_ms as waited_ms from ev r
join failure f on f.task = r.task and f.attempt = r.attempt join task t on t.task = r.task
where r.kind = 'task.retried' and r.verdict = 'applied' and r.time_ms - f.time_ms + 3
    < least(t.backoff_ms * pow(t.backoff_factor, f.number - 1), t.backoff_ms_max) * (1 - t.jitter)

-- name: I17c_hopeless_tried_again
-- What cannot be helped by another try gets none.
-- part: hopeless
-- looked: select count(*) from ev where kind = 'task.failed' and verdict = 'applied' and not retryable
select r.seq, r.task from ev r join ev f on f.task = r.task and f.attempt = r.attempt
where r.kind = 'task.retried' and r.verdict = 'applied'
and f.kind = 'task.failed' and f.verdict = 'applied' and not f.retryable

-- name: I19a_more_at_once_than_slots
-- No worker process runs more at once than it has slots: by what the tasks themselves wrote.
-- part: nap
-- looked: select count(*) from fx where what = 'begin'
select f.pos, f.pid, f.running, w.slots from (
    select pos, pid, what, sum(case what when 'begin' then 1 when 'end' then -1 else 0 end) over (
        partition by pid order by pos) as running from fx) f
join (select pid, max(slots) as slots from worker group by pid) w on w.pid = f.pid
where f.what = 'begin' and f.running > w.slots

-- name: I19b_holds_more_than_it_can
-- No incarnation holds more assignments than its slots and what it is willing to hold ahead.
-- part: always
-- looked: select count(*) from held
select h.seq, h.incarnation, h.holding from (
    select seq, incarnation, sum(change) over (partition by incarnation order by pos) as holding from held) h
join worker w on w.incarnation = h.incarnation where h.holding > w.slots + w.ahead

-- name: I19c_suspects_together
-- Suspects begin one at a time at a worker, so that one killer does not condemn the others.
-- part: kill worker
-- looked: select count(*) from suspicion
select incarnation, pos // 8192 as seq, suspects from (
    select incarnation, pos, change, sum(change) over (partition by incarnation order by pos) as suspects
    from suspicion)
where change > 0 and suspects > 1

-- name: I19d_more_cores_than_there_are
-- No incarnation holds tasks that ask for more cores than it offers.
-- part: nap
-- looked: select count(*) from held where cpu > 0
select h.seq, h.incarnation, h.used from (
    select seq, incarnation, sum(change * cpu) over (partition by incarnation order by pos) as used
    from held where cpu > 0) h
join worker w on w.incarnation = h.incarnation where h.used > w.cpu + 1e-6

-- name: I20a_not_alive_afterwards
-- In time after the last fault: all work ended, nobody lags, exactly one leads.
-- part: always
-- looked: select count(*) from liveness
select what, detail from liveness where not ok

-- name: I20b_client_never_told
-- Who waits for an end is told of it.
-- part: always
-- looked: select count(*) from told
select client, n, task from told where state = ''

-- name: I20c_node_ended_by_itself
-- Nodes survive whatever happens to the servers; clients end when they are done, without an error.
-- part: always
-- looked: select count(*) from exited
select node, pid, code from exited
where not by_us and (code <> 0 or node not like 'client-%') and (ready or node like 'client-%')

-- name: I21_timed_out_early
-- No jump of a clock ends an attempt before its time (less 5 ms of a timer's grain).
-- part: slow
-- looked: select count(*) from ev where kind = 'task.failed' and error = 'timeout' and verdict = 'applied'
select e.seq, e.task, e.run_us from ev e join task t on t.task = e.task
where e.kind = 'task.failed' and e.error = 'timeout' and e.verdict = 'applied' and e.run_us + 5000 < t.timeout_ms * 1000

-- name: I22_object_not_what_it_was
-- What the log refers to is there, with the bytes it names.
-- part: large
-- looked: select count(*) from object
select seq, name, wrong from object where wrong <> ''

-- name: I23_told_otherwise
-- What clients are told of ends is what the log says.
-- part: always
-- looked: select count(*) from told where state <> ''
select t.client, t.task, t.state, e.state as ended from told t
left join ending e on e.task = t.task left join workflow_ended w on w.workflow = t.task
where t.state <> '' and case
    when w.workflow is not null then t.state is distinct from w.state
    else t.state is distinct from e.state or t.pos is distinct from e.pos end

-- name: I24_secret_shown
-- A secret in a worker's environment reaches neither tasks nor log, journals or process logs.
-- part: shell
-- looked: select (select count(*) from msg) + (select count(*) from file)
select seq::varchar as place from msg where canary union all select name from file where canary

-- name: E01_effect_of_nothing_assigned
-- Whatever had an effect was assigned, in the log, to the worker that did it.
-- part: effect
-- looked: select count(*) from fx where what = 'begin'
select f.pos, f.task, f.attempt, f.worker from fx f where f.what = 'begin' and not exists (
    select 1 from ev a join worker w on w.incarnation = a.incarnation
    where a.kind = 'task.assigned' and a.task = f.task and a.attempt = f.attempt and w.name = f.worker)

-- name: E02_completed_without_effect
-- A task that is said to have completed did what it had to do.
-- part: effect
-- looked: select count(*) from task where runs in ('effect', 'nap')
select e.seq, e.task, e.attempt from ev e join task t on t.task = e.task
left join fx f on f.task = e.task and f.attempt = e.attempt and f.what = 'end'
where t.runs in ('effect', 'nap') and e.kind = 'task.completed' and e.verdict = 'applied' and f.task is null

-- name: E03_one_assignment_run_twice
-- Each assignment is run at most once.
-- part: effect
-- looked: select count(*) from fx where what = 'begin'
select f.task, f.attempt, f.worker, f.times, a.times as assigned from (
    select task, attempt, worker, count(*) as times from fx where what = 'begin' group by all) f
left join (
    select a.task, a.attempt, w.name as worker, count(*) as times from ev a join worker w on w.incarnation = a.incarnation
    where a.kind = 'task.assigned' and a.task in (select task from fx) group by all) a
on a.task = f.task and a.attempt = f.attempt and a.worker = f.worker where f.times > coalesce(a.times, 0)

-- name: H01_history_is_not_the_log
-- A history that a master kept, whatever happened to it, is the one that the log makes.
-- part: always
-- looked: select coalesce(sum(found), 0) from history where name in ('frames', 'task_changes')
select folder, name, wrong from history where wrong <> ''
