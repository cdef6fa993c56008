{{/* Names. 44 characters: with "-engine", "-0" and the hash that a StatefulSet appends they stay below 63. A longer one
     ends with a hash of the whole, so that two that begin alike stay two. */}}
{{- define "quire.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- $full = default $full .Values.fullnameOverride -}}
{{- if gt (len $full) 44 -}}
{{- $full = printf "%s-%s" ($full | trunc 35 | trimSuffix "-") ($full | sha256sum | trunc 8) -}}
{{- end -}}
{{- $full -}}
{{- end }}

{{- define "quire.serviceAccountName" -}}
{{- default (ternary (include "quire.fullname" .) "default" .Values.serviceAccount.create) .Values.serviceAccount.name -}}
{{- end }}

{{/* Labels of a Service's or policy's selector; takes (root, component). */}}
{{- define "quire.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ default $root.Chart.Name $root.Values.nameOverride | quote }}
app.kubernetes.io/instance: {{ $root.Release.Name | quote }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* The recommended labels; takes (root, component). */}}
{{- define "quire.labels" -}}
{{- $root := index . 0 -}}
{{ include "quire.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: quire
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- end }}

{{/* Image of a service; takes (root, service). */}}
{{- define "quire.image" -}}
{{- $root := index . 0 -}}
{{- $service := index . 1 -}}
{{- $name := printf "%s-%s" $root.Values.image.repository $service -}}
{{- with index $root.Values.image.digests $service -}}
{{- printf "%s@%s" $name . -}}
{{- else -}}
{{- printf "%s:%s" $name (default $root.Chart.AppVersion $root.Values.image.tag) -}}
{{- end -}}
{{- end }}

{{/* Ports are fixed: they are the services' own defaults. */}}
{{- define "quire.isSingle" -}}
{{- if eq .Values.profile "single-container" }}true{{ end -}}
{{- end }}

{{/* Address of the engine's Pod by its own name: memory and compute of one engine, never of two. */}}
{{- define "quire.engineHost" -}}
{{- $engine := printf "%s-engine" (include "quire.fullname" .) -}}
{{- printf "%s-0.%s" $engine $engine -}}
{{- end }}

{{/* Numbers that follow from others; each prints an integer. */}}

{{/* The pool's file and what lies beside it, since a full tmpfs ends the memory service: a log that is folded and the one
     behind it, the older ones, and 188 MiB for two snapshots of 400,000 blocks and logs that grow with them. */}}
{{- define "quire.stateMiB" -}}
{{- with .Values.pool -}}
{{- add (int64 .sizeMiB) (mul 2 (int64 .logCompactMiB)) (int64 .logHistoryMiB) 188 -}}
{{- end -}}
{{- end }}

{{/* All of the tmpfs, and twice, for compaction, the interpreter and the books. With default values 512 MiB beside the
     pool. */}}
{{- define "quire.memoryMiB" -}}
{{- add (include "quire.stateMiB" . | int64) 256 -}}
{{- end }}

{{/* The pool, memory's own, compute's own and the router's 512 MiB in one container. */}}
{{- define "quire.singleMiB" -}}
{{- add (include "quire.memoryMiB" . | int64) (int64 .Values.compute.memoryMiB) 512 -}}
{{- end }}

{{/* The router: until SIGTERM, until its requests ended, and ten seconds to say goodbye. */}}
{{- define "quire.routerGraceSeconds" -}}
{{- add (int64 .Values.drain.preStopSeconds) (int64 .Values.drain.graceSeconds) 10 -}}
{{- end }}

{{/* The engine outlives the router's drain when both Pods end together (uninstall, a node that is shut down). */}}
{{- define "quire.enginePreStopSeconds" -}}
{{- add (int64 .Values.drain.preStopSeconds) (int64 .Values.drain.graceSeconds) 5 -}}
{{- end }}

{{/* Seconds that memory leaves its streams: when it is told to stop compute has ended, so nothing is worth waiting for. */}}
{{- define "quire.memoryStopSeconds" -}}5{{- end }}

{{/* After the sleep: compute's last step and its goodbye (20), then memory, which stops last. */}}
{{- define "quire.engineGraceSeconds" -}}
{{- add (include "quire.enginePreStopSeconds" . | int64) 20 (include "quire.memoryStopSeconds" . | int64) 5 -}}
{{- end }}

{{/* `quire up` ends its three children one after the other, each within the grace and five seconds. */}}
{{- define "quire.singleGraceSeconds" -}}
{{- add (int64 .Values.drain.preStopSeconds) (mul 3 (add (int64 .Values.drain.graceSeconds) 5)) 5 -}}
{{- end }}
