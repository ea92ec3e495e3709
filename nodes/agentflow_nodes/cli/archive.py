"""`agentflow archive`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from agentflow.bus import Bus
from agentflow.log.jetstream import JetStreamLog
from agentflow_nodes.archiver.node import ArchiverConfig, ArchiverNode, archiver_of
from agentflow_nodes.cli.amounts import parse_age, parse_size, size_text
from agentflow_nodes.cli.archiving import KeepAge, KeepBytes, SealAfter
from agentflow_nodes.cli.daemon import Supervised, node_logs, serve
from agentflow_nodes.cli.errors import usage
from agentflow_nodes.cli.options import Debug, Json, Namespace, Nats
from agentflow_nodes.cli.output import console, plain, print_json, table
from agentflow_nodes.cli.progress import bar
from agentflow_nodes.cli.session import CLIENT_NAME, Target, client_logs, open_log, run, target
from agentflow_projections.archive import Archive, Stretch, verify
from agentflow_projections.archiver import Keep, Sealing


def archive_command(  # noqa: PLR0913, PLR0917 - options
    where: Annotated[
        str,
        typer.Option(
            "--dir",
            metavar="DIR|S3",
            help="Where the archive is, or will be: a folder, or s3://bucket/prefix.",
        ),
    ] = ".agentflow/archive",
    once: Annotated[
        bool, typer.Option("--once", help="Archive what is there now, trim as told, and end.")
    ] = False,
    check: Annotated[
        bool,
        typer.Option("--verify", help="Only read the whole archive against its hashes; needs no server."),
    ] = False,
    keep_age: KeepAge = "",
    keep_bytes: KeepBytes = "",
    seal_after: SealAfter = "1h",
    nats: Nats = None,
    namespace: Namespace = "default",
    as_json: Json = False,
    debug: Debug = False,
    supervised: Supervised = False,
) -> None:
    """Keep the log in Parquet files by day, and the live log short.

    What is sealed is read back against the hash chain of the log. Only what is in the archive is
    ever trimmed, and only once a snapshot of the state stands for it, restored on trial. Nothing
    younger than five minutes is trimmed. Stopped at any moment, it goes on where it was.

    For example:

        agentflow archive --once
        agentflow archive --dir /var/lib/agentflow/archive --keep-age 7d --keep-bytes 20GiB
        agentflow archive --dir /var/lib/agentflow/archive --verify
        agentflow archive --dir s3://backups/agentflow --keep-age 7d
    """
    cluster = target(nats, namespace)
    if check:
        _verify(Archive(where, cluster.namespace), as_json=as_json)
        return
    config = ArchiverConfig(
        where=where,
        url=cluster.url,
        namespace=cluster.namespace,
        keep=parse_keep(keep_age, keep_bytes),
        sealing=Sealing(after_s=parse_age("--seal-after", seal_after)),
    )
    if once:
        run(_once(config, cluster, as_json=as_json), logs=client_logs(debug=debug))
        return
    told = {"node": "archiver", "url": cluster.url, "namespace": cluster.namespace, "dir": where}
    text = f"Archiver is ready on {cluster.url}: namespace {cluster.namespace} in {where}."
    node = ArchiverNode(config)
    run(serve(node, told, text, as_json=as_json, supervised=supervised), logs=node_logs(debug=debug))


def parse_keep(age: str, size: str) -> Keep:
    """What stays in the live log. Raises CliError."""
    return Keep(
        age_s=parse_age("--keep-age", age) if age else None,
        bytes=parse_size("--keep-bytes", size) if size else None,
    )


async def _once(config: ArchiverConfig, where: Target, *, as_json: bool) -> None:
    async with (
        open_log(where),  # says it well if there is nothing
        Bus(where.urls, name=f"agentflow {CLIENT_NAME}") as bus,
        JetStreamLog(bus, where.namespace, create=False) as log,
        archiver_of(config, bus, log) as archiver,
    ):
        until, before = (await log.identity()).last_seq, archiver.sealed_seq
        with bar("Archiving") as tell:
            await archiver.run(until=until, progress=lambda seq: tell(seq, until))
        trimmed_seq = (await log.identity()).trimmed_seq
    fresh = [each for each in archiver.stretches if each.last_seq > before]
    _show(fresh, archiver.stretches, trimmed_seq, as_json=as_json)


def _show(fresh: Sequence[Stretch], found: Sequence[Stretch], trimmed_seq: int, *, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "sealed": [_told(each) for each in fresh],
                "archived_seq": found[-1].last_seq if found else 0,
                "trimmed_seq": trimmed_seq,
            }
        )
        return
    console().print(_table(fresh) if fresh else plain("Nothing new to archive."))
    if trimmed_seq:
        console().print(plain(f"The live log begins after message {trimmed_seq}."))


def _told(stretch: Stretch) -> dict[str, Any]:
    manifest = stretch.manifest
    return {
        "dir": stretch.where,
        "first_seq": manifest.first_seq,
        "last_seq": manifest.last_seq,
        "events": manifest.events,
        "bytes": _stored(stretch),
    }


def _stored(stretch: Stretch) -> int:
    return sum(file.size for file in stretch.manifest.files.values())


def _table(stretches: Sequence[Stretch]) -> Any:
    shown = table(
        "day", "messages", "events", "size", "bytes an event", right=("events", "size", "bytes an event")
    )
    for each in stretches:
        manifest, size = each.manifest, _stored(each)
        shown.add_row(
            each.day,
            f"{manifest.first_seq} to {manifest.last_seq}",
            f"{manifest.events}",
            size_text(size),
            f"{size / max(manifest.events, 1):.1f}",
        )
    return shown


def _verify(archive: Archive, *, as_json: bool) -> None:
    stretches = archive.stretches()
    if not stretches:
        raise usage(
            f"--dir: expected an archive of namespace {archive.namespace!r}, found none in {archive.where}"
        )
    with bar("Verifying") as tell:
        for number, stretch in enumerate(stretches, 1):
            verify(stretch)
            tell(number, len(stretches))
    first, last = stretches[0].manifest, stretches[-1].manifest
    if as_json:
        print_json(
            {
                "sound": True,
                "first_seq": first.first_seq,
                "last_seq": last.last_seq,
                "chain": last.chain_after,
            }
        )
    else:
        console().print(
            plain(
                f"Messages {first.first_seq} to {last.last_seq} are sound; the hash chain ends with {last.chain_after}."
            )
        )
