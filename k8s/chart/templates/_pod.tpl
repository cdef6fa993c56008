{{/* What the Pods share. */}}

{{- define "quire.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "quire.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* Where a Pod runs and as whom; takes (root, values of the Pod). */}}
{{- define "quire.placement" -}}
{{- $root := index . 0 -}}
{{- $pod := index . 1 -}}
serviceAccountName: {{ include "quire.serviceAccountName" $root | quote }}
automountServiceAccountToken: false
# A Service named quire-... would put variables QUIRE_... into every container, and settings are strict.
enableServiceLinks: false
securityContext:
  {{- include "quire.podSecurity" $root | nindent 2 }}
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- with $pod.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- range $key := list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" }}
{{- with index $pod $key }}
{{ $key }}:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end }}

{{/* Image and security of a container; takes (root, service). */}}
{{- define "quire.container" -}}
image: {{ include "quire.image" . | quote }}
imagePullPolicy: {{ (index . 0).Values.image.pullPolicy }}
securityContext:
  {{- include "quire.containerSecurity" (index . 0) | nindent 2 }}
{{- end }}

{{/* Paths that are written to, on a root that is not. */}}
{{- define "quire.env" -}}
- {name: HOME, value: /tmp}
- {name: TMPDIR, value: /tmp}
{{- end }}

{{- define "quire.computeEnv" -}}
- {name: HOME, value: /var/cache/quire}
- {name: TMPDIR, value: /tmp}
- {name: NUMBA_CACHE_DIR, value: /var/cache/quire/numba}
- {name: TRITON_CACHE_DIR, value: /var/cache/quire/triton}
# Nothing is fetched at run time: the model is mounted or inside the image.
- {name: HF_HUB_OFFLINE, value: "1"}
{{- end }}

{{/* Three probes of one gRPC port; takes (root, port, seconds to start, health service that means started). A container
     that does not answer has nothing to drain: it gets ten seconds, in which preStop runs too, instead of the Pod's grace
     period. */}}
{{- define "quire.probes" -}}
{{- $port := index . 1 -}}
startupProbe:
  grpc: {port: {{ $port }}, service: {{ index . 3 }}}
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: {{ div (add (int64 (index . 2)) 1) 2 }}
  terminationGracePeriodSeconds: 10
livenessProbe:
  grpc: {port: {{ $port }}, service: liveness}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
  terminationGracePeriodSeconds: 10
readinessProbe:
  grpc: {port: {{ $port }}, service: readiness}
  periodSeconds: 5
  timeoutSeconds: 2
  failureThreshold: 2
{{- end }}

{{/* Request and limit of memory, request of CPU; takes (CPU, MiB). No CPU limit: being throttled in the middle of a step
     costs more than a neighbour does, and threads are bounded by --num-threads. */}}
{{- define "quire.resources" -}}
requests:
  cpu: {{ index . 0 | quote }}
  memory: {{ index . 1 }}Mi
limits:
  memory: {{ index . 1 }}Mi
{{- end }}

{{- define "quire.modelMount" -}}
{{- if eq .Values.model.source "pvc" -}}
- {name: model, mountPath: /model, readOnly: true}
{{- end -}}
{{- end }}

{{- define "quire.modelVolume" -}}
{{- if eq .Values.model.source "pvc" -}}
- name: model
  persistentVolumeClaim:
    claimName: {{ .Values.model.claimName | quote }}
    readOnly: true
{{- end -}}
{{- end }}

{{/* Flags, a group of settings each. */}}

{{- define "quire.logFlags" -}}
- --log-level={{ .Values.logs.level }}
- --log-format={{ .Values.logs.format }}
{{- end }}

{{/* One of the addresses of a service; takes (root, port). A service reads a bare "[::]:7072" as a broken JSON list of
     addresses, so it gets a whole one. */}}
{{- define "quire.listenFlag" -}}
{{- $host := (index . 0).Values.listenHost -}}
{{- if eq $host "0.0.0.0" -}}
- --listen={{ $host }}:{{ index . 1 }}
{{- else -}}
- '--listen=["{{ $host }}:{{ index . 1 }}"]'
{{- end -}}
{{- end }}

{{/* Takes (root, port). */}}
{{- define "quire.metricsFlag" -}}
- --metrics-listen={{ if (index . 0).Values.metrics.enabled }}{{ (index . 0).Values.listenHost }}:{{ index . 1 }}{{ else }}off{{ end }}
{{- end }}

{{- define "quire.poolFlags" -}}
- --memory-budget={{ int64 .Values.pool.sizeMiB }}MiB
- --state-dir=/var/lib/quire
- --{{ if not .Values.pool.prefixCache }}no-{{ end }}prefix-cache
- --min-partial-tokens={{ int64 .Values.pool.minPartialTokens }}
- --log-compact-size={{ int64 .Values.pool.logCompactMiB }}MiB
- --log-history={{ int64 .Values.pool.logHistoryMiB }}MiB
{{- end }}

{{- define "quire.modelFlags" -}}
{{- with .Values.model -}}
- --model={{ if eq .source "demo" }}demo{{ else }}{{ printf "/model/%s" .path | trimSuffix "/" }}{{ end }}
- --dtype={{ .dtype }}
- --block-size={{ int64 .blockSize }}
{{- if .maxModelLen }}
- --max-model-len={{ int64 .maxModelLen }}
{{- end }}
- --{{ if not .trustRemoteCode }}no-{{ end }}trust-remote-code
{{- end }}
- --num-threads={{ int64 .Values.compute.cpu }}
- --memory-patience-s={{ .Values.compute.memoryPatienceSeconds }}
- --{{ if not .Values.compute.packedWeights }}no-{{ end }}packed-weights
- --{{ if not .Values.compute.fusedOps }}no-{{ end }}fused-ops
- --{{ if not .Values.compute.fusedLayers }}no-{{ end }}fused-layers
- --attention-kernel={{ .Values.compute.attentionKernel }}
{{- end }}

{{- define "quire.schedulingFlags" -}}
{{- with .Values.scheduling -}}
- --max-num-seqs={{ int64 .maxNumSeqs }}
- --max-num-batched-tokens={{ int64 .maxNumBatchedTokens }}
- --watermark={{ .watermark }}
- --queue-limit={{ int64 .queueLimit }}
- --steps-in-flight={{ int64 .stepsInFlight }}
- --stream-interval-ms={{ .streamIntervalMs }}
{{- end }}
{{- with .Values.model.servedName }}
- {{ printf "--served-model-name=%s" . | quote }}
{{- end }}
- --metrics-compat={{ .Values.metrics.compat }}
{{- end }}

{{/* Each on a line of its own where there is one; nothing else, so that they can follow other flags. */}}
{{- define "quire.tenantFlags" -}}
{{- if .Values.tenants.secretName -}}
- --tenants=/etc/quire/tenants/tenants.yaml
{{- end -}}
{{- with .Values.tenants.metadataKey -}}
- {{ printf "--tenant-metadata=%s" . | quote }}
{{- end -}}
{{- end }}

{{- define "quire.tenantsMount" -}}
{{- if .Values.tenants.secretName -}}
- {name: tenants, mountPath: /etc/quire/tenants, readOnly: true}
{{- end -}}
{{- end }}

{{- define "quire.tenantsVolume" -}}
{{- with .Values.tenants.secretName -}}
- name: tenants
  secret:
    secretName: {{ . | quote }}
    defaultMode: 0440
{{- end -}}
{{- end }}

{{/* Labels and annotations of a Pod; takes (root, component, values of the Pod, default container). The chart's version is
     none of them: a change of the chart alone must not restart an engine and lose its cache. */}}
{{- define "quire.podMetadata" -}}
{{- $pod := index . 2 -}}
labels:
  {{- include "quire.selector" . | nindent 2 }}
  app.kubernetes.io/version: {{ (index . 0).Chart.AppVersion | quote }}
  app.kubernetes.io/part-of: quire
  {{- with $pod.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
annotations:
  kubectl.kubernetes.io/default-container: {{ index . 3 }}
  {{- with $pod.podAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
