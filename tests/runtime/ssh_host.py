"""A small ssh server for tests: ``python ssh_host.py ADDRESS PORT HOST_KEY CLIENT_KEYS``."""

import asyncio
import sys

import asyncssh


async def run(process):
    """Run the command the client asked for, as sshd would."""
    child = await asyncio.create_subprocess_shell(
        process.command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    await process.redirect(stdin=child.stdin, stdout=child.stdout, stderr=child.stderr)
    code = await child.wait()
    process.exit(code if code >= 0 else 255)


async def main(address, port, host_key, client_keys):
    server = await asyncssh.listen(
        address,
        int(port),
        server_host_keys=[host_key],
        authorized_client_keys=client_keys,
        process_factory=run,
        encoding=None,
    )
    await server.wait_closed()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
