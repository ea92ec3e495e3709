-- What several invariants look at, made once everything is loaded.

-- The one end of each task: its own event, or the one because of which it was skipped.
create or replace table ending as
select task, pos, case kind
    when 'task.completed' then 'completed' when 'task.cancelled' then 'cancelled' else 'failed' end as state
from ev where ends
union all
select task, pos, 'skipped' from skipped;

-- When an incarnation ceased to be.
create or replace table gone as
select incarnation, min(pos) as pos from (
    select incarnation, pos from ev where kind in ('worker.lost', 'worker.left') and verdict = 'applied'
    union all
    select w.incarnation, min(later.incarnation) * 8192 from worker w
    join worker later on later.name = w.name and later.incarnation > w.incarnation group by w.incarnation)
group by incarnation;

-- What each incarnation holds, step by step. Of the dead it does not matter any more.
create or replace table held as
select e.seq, e.pos, a.incarnation, case when e.kind = 'task.assigned' then 1 else -1 end as change,
    a.suspect, coalesce(t.cpu, 0) as cpu
from ev e
join ev a on a.task = e.task and a.attempt = e.attempt and a.kind = 'task.assigned' and a.verdict = 'applied'
left join task t on t.task = e.task
where e.verdict = 'applied' and e.kind in ('task.assigned', 'task.completed', 'task.failed', 'task.declined');

-- Suspects at each incarnation: from their assignment until they have certainly begun, or are out of its hands.
create or replace table suspicion as
with stay as (
    select a.incarnation, a.pos, min(e.pos) as over from ev a
    left join ev e on e.task = a.task and e.attempt = a.attempt and e.incarnation = a.incarnation
        and e.verdict = 'applied' and e.kind in ('task.started', 'task.completed', 'task.failed', 'task.declined')
    where a.suspect and a.verdict = 'applied' group by a.incarnation, a.pos)
select incarnation, pos, 1 as change from stay
union all
select incarnation, over, -1 from stay where over is not null;

-- How long holders could be certain of their locks, by the machine's monotonic clock.
create or replace table certain as
select b.task as name, b.token, b.mono_ns as began, e.mono_ns as ended, l.mode, l.permits from fx b
join fx e on e.what = 'held' and e.task = b.task and e.token = b.token
join lock l on l.kind = 'lock.acquired' and l.name = b.task and l.token = b.token
where b.what = 'hold';
