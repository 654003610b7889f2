# syntax=docker/dockerfile:1

# The page's SDK, from npm.
FROM node:22-slim AS sdk
WORKDIR /src
COPY package.json package-lock.json .npmrc ./
COPY clients/js/package.json clients/js/
COPY examples/chat/package.json examples/chat/
RUN npm ci --omit=dev

# One static executable. Go fetches the toolchain that go.mod asks for.
FROM golang:1 AS build
ENV GOTOOLCHAIN=auto CGO_ENABLED=0
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
COPY --from=sdk /src/node_modules/pocketbase/dist/pocketbase.es.mjs pb_public/lib/
ARG VERSION=docker
RUN go build -trimpath -ldflags "-s -w -X main.version=${VERSION}" -o /herald .

# Alpine for its certificates, its shell for the health check, and wget.
FROM alpine:3
RUN apk add --no-cache ca-certificates tzdata \
 && adduser -D -H -u 10001 herald \
 && install -d -o herald -g herald /herald/pb_data
COPY --from=build /herald /herald/herald
USER herald
WORKDIR /herald
VOLUME /herald/pb_data
EXPOSE 8090
HEALTHCHECK --interval=30s --timeout=3s --start-period=10s \
  CMD wget -q -O /dev/null http://127.0.0.1:8090/api/health || exit 1
ENTRYPOINT ["/herald/herald"]
CMD ["serve", "--http=0.0.0.0:8090"]
