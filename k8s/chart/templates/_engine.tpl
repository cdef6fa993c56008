{{/* The containers of the engine's Pod. */}}

{{/* A native sidecar: starts before compute, stops after it. */}}
{{- define "quire.memoryContainer" -}}
- name: memory
  restartPolicy: Always
  {{- include "quire.container" (list . "memory") | nindent 2 }}
  command: [quire, memory]
  args:
    - --listen=unix:/run/quire/memory.sock
    {{- include "quire.listenFlag" (list . 7072) | nindent 4 }}
    - --descriptor-socket=/run/quire/descriptor.sock
    {{- include "quire.poolFlags" . | nindent 4 }}
    - --lease-ttl-s={{ .Values.memory.leaseTtlSeconds }}
    - --max-num-rows={{ int64 .Values.memory.maxNumRows }}
    - --shutdown-grace-s={{ include "quire.memoryStopSeconds" . }}
    {{- include "quire.metricsFlag" (list . 7082) | nindent 4 }}
    {{- include "quire.logFlags" . | nindent 4 }}
  env:
    {{- include "quire.env" . | nindent 4 }}
  ports:
    - {name: grpc-memory, containerPort: 7072}
    {{- if .Values.metrics.enabled }}
    - {name: metrics-memory, containerPort: 7082}
    {{- end }}
  {{- include "quire.probes" (list . 7072 60 "startup") | nindent 2 }}
  resources:
    {{- include "quire.resources" (list .Values.memory.cpu (include "quire.memoryMiB" .)) | nindent 4 }}
    {{- with include "quire.claims" . }}
    {{- . | nindent 4 }}
    {{- end }}
  volumeMounts:
    - {name: sockets, mountPath: /run/quire}
    - {name: state, mountPath: /var/lib/quire}
    - {name: memory-tmp, mountPath: /tmp}
{{- end }}

{{- define "quire.computeContainer" -}}
- name: compute
  {{- include "quire.container" (list . "compute") | nindent 2 }}
  command: [quire, compute]
  args:
    {{- include "quire.listenFlag" (list . 7073) | nindent 4 }}
    - --memory-address=unix:/run/quire/memory.sock
    - --device={{ ternary "cuda" "cpu" (eq .Values.profile "dra") }}
    {{- include "quire.modelFlags" . | nindent 4 }}
    - --shutdown-grace-s={{ int64 .Values.drain.graceSeconds }}
    {{- include "quire.metricsFlag" (list . 7083) | nindent 4 }}
    {{- include "quire.logFlags" . | nindent 4 }}
  env:
    {{- include "quire.computeEnv" . | nindent 4 }}
  ports:
    - {name: grpc-compute, containerPort: 7073}
    {{- if .Values.metrics.enabled }}
    - {name: metrics-compute, containerPort: 7083}
    {{- end }}
  # It has started once the model is loaded.
  {{- include "quire.probes" (list . 7073 .Values.startupSeconds "startup") | nindent 2 }}
  lifecycle:
    preStop:
      sleep: {seconds: {{ include "quire.enginePreStopSeconds" . }}}
  resources:
    {{- include "quire.resources" (list (int64 .Values.compute.cpu) (int64 .Values.compute.memoryMiB)) | nindent 4 }}
    {{- with include "quire.claims" . }}
    {{- . | nindent 4 }}
    {{- end }}
  volumeMounts:
    - {name: sockets, mountPath: /run/quire}
    - {name: compute-tmp, mountPath: /tmp}
    - {name: cache, mountPath: /var/cache/quire}
    {{- with include "quire.modelMount" . }}
    {{- . | nindent 4 }}
    {{- end }}
{{- end }}

{{/* `quire up`: all three services as children of one process. */}}
{{- define "quire.singleContainer" -}}
- name: quire
  {{- include "quire.container" (list . "compute") | nindent 2 }}
  command: [quire, up]
  args:
    - --listen={{ .Values.listenHost }}:7071
    - --device={{ ternary "cuda" "cpu" (gt (int .Values.gpu.count) 0) }}
    {{- include "quire.poolFlags" . | nindent 4 }}
    {{- include "quire.modelFlags" . | nindent 4 }}
    {{- include "quire.schedulingFlags" . | nindent 4 }}
    {{- with include "quire.tenantFlags" . }}
    {{- . | nindent 4 }}
    {{- end }}
    - --shutdown-grace-s={{ int64 .Values.drain.graceSeconds }}
    - --{{ if not .Values.metrics.enabled }}no-{{ end }}metrics
    {{- include "quire.logFlags" . | nindent 4 }}
  env:
    {{- include "quire.computeEnv" . | nindent 4 }}
  ports:
    - {name: grpc-router, containerPort: 7071}
    {{- if .Values.metrics.enabled }}
    - {name: metrics-router, containerPort: 7081}
    - {name: metrics-memory, containerPort: 7082}
    - {name: metrics-compute, containerPort: 7083}
    {{- end }}
  # The router answers before the model is loaded, and is ready after it: only that bounds loading here.
  {{- include "quire.probes" (list . 7071 .Values.startupSeconds "readiness") | nindent 2 }}
  lifecycle:
    preStop:
      sleep: {seconds: {{ int64 .Values.drain.preStopSeconds }}}
  resources:
    {{- include "quire.resources" (list (int64 .Values.compute.cpu) (include "quire.singleMiB" .)) | nindent 4 }}
      {{- if .Values.gpu.count }}
      {{ .Values.gpu.resourceName }}: {{ int .Values.gpu.count }}
      {{- end }}
  volumeMounts:
    - {name: state, mountPath: /var/lib/quire}
    - {name: compute-tmp, mountPath: /tmp}
    - {name: cache, mountPath: /var/cache/quire}
    {{- with include "quire.modelMount" . }}
    {{- . | nindent 4 }}
    {{- end }}
    {{- with include "quire.tenantsMount" . }}
    {{- . | nindent 4 }}
    {{- end }}
{{- end }}

{{/* Both containers name the one claim, so both see the same device. */}}
{{- define "quire.claims" -}}
{{- if eq .Values.profile "dra" -}}
claims:
  - {name: gpu}
{{- end -}}
{{- end }}

{{- define "quire.engineVolumes" -}}
{{- if not (include "quire.isSingle" .) -}}
- name: sockets
  emptyDir: {medium: Memory, sizeLimit: 1Mi}
- name: memory-tmp
  emptyDir: {sizeLimit: 64Mi}
{{ end -}}
# The pool's file, which the memory service reserves when compute first attaches, and the log of its changes. All of it
# counts against the memory container's limit.
- name: state
  emptyDir: {medium: Memory, sizeLimit: {{ include "quire.stateMiB" . }}Mi}
- name: compute-tmp
  emptyDir: {sizeLimit: 256Mi}
- name: cache
  emptyDir: {sizeLimit: 2Gi}
{{- end }}
