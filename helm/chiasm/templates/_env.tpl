{{/* Environment of a component's container: root, component, spec. */}}
{{- define "chiasm.env" -}}
{{- $root := .root -}}
{{- $fullname := include "chiasm.fullname" .root -}}
{{- $values := .spec.values -}}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
# Everything that a library may want to write goes to the volume there.
- {name: HOME, value: /tmp}
- {name: CHIASM_BIND, value: "{{ $root.Values.bindAddress }}:{{ .spec.port }}"}
- {name: CHIASM_METRICS_PORT, value: "9090"}
# The kubelet's probes speak no TLS and bring no API key.
- {name: CHIASM_HEALTH_PORT, value: "9091"}
- {name: CHIASM_ADVERTISE_HOST, value: $(POD_IP)}
{{- with $values.drainSeconds }}
- {name: CHIASM_GRACE_S, value: {{ . | quote }}}
{{- end }}
{{- if eq .component "orchestrator" }}
{{- include "chiasm.orchestratorEnv" $root }}
{{- else }}
- {name: CHIASM_ORCHESTRATOR, value: {{ include "chiasm.orchestrator" $root | quote }}}
- {name: CHIASM_MEMBER_NAME, value: $(POD_NAME)}
{{- end }}
{{- if .spec.model }}
- {name: CHIASM_MODEL, value: {{ include "chiasm.modelPath" $root | quote }}}
- {name: CHIASM_DTYPE, value: {{ $root.Values.model.dtype }}}
{{- end }}
{{- with $values.device }}
- {name: CHIASM_DEVICE, value: {{ . | quote }}}
{{- end }}
{{- include "chiasm.deviceEnv" $values }}
{{- with .spec.modality }}
- {name: CHIASM_MODALITY, value: {{ . }}}
- {name: CHIASM_SHARDS, value: "auto/{{ include "chiasm.scalar" $.spec.shards }}"}
{{- end }}
{{- if eq .component "gateway" }}
- {name: CHIASM_MODEL_NAME, value: {{ default $root.Release.Name $root.Values.model.name | quote }}}
{{- if $root.Values.auth.enabled }}
- {name: CHIASM_API_KEYS, value: /etc/chiasm/auth/{{ $root.Values.auth.secretKey }}}
- {name: CHIASM_KEYLESS, value: {{ $root.Values.auth.keyless }}}
{{- end }}
{{- if include "chiasm.gatewayTlsSecret" $root }}
- {name: CHIASM_PUBLIC_TLS_CERT, value: /etc/chiasm/public-tls/tls.crt}
- {name: CHIASM_PUBLIC_TLS_KEY, value: /etc/chiasm/public-tls/tls.key}
{{- end }}
{{- if $root.Values.tls.gateway.clientCASecret }}
- {name: CHIASM_PUBLIC_TLS_CA, value: /etc/chiasm/client-ca/ca.crt}
{{- end }}
{{- end }}
{{- if $root.Values.tls.enabled }}
- {name: CHIASM_TLS_CERT, value: /etc/chiasm/tls/tls.crt}
- {name: CHIASM_TLS_KEY, value: /etc/chiasm/tls/tls.key}
- {name: CHIASM_TLS_CA, value: /etc/chiasm/tls/ca.crt}
- {name: CHIASM_TLS_NAME, value: {{ include "chiasm.tlsName" $root | quote }}}
{{- end }}
{{- range $name, $value := $values.settings }}
- {name: CHIASM_{{ upper $name }}, value: {{ include "chiasm.scalar" $value | quote }}}
{{- end }}
{{- include "chiasm.tracingEnv" $root }}
{{- with $values.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* What the libraries below are told, unless env says otherwise: the service's values. As many threads
     on CPUs as are requested, as torch would take all of the node's, and have them spin; and no GPU
     where none is used, as a runtime would show the CUDA image all of them. */}}
{{- define "chiasm.deviceEnv" -}}
{{- $device := default "" .device -}}
{{- $own := dict -}}
{{- if eq $device "cpu" -}}{{- $_ := set $own "OMP_WAIT_POLICY" "PASSIVE" -}}{{- end -}}
{{- if not (hasPrefix "cuda" $device) -}}{{- $_ := set $own "NVIDIA_VISIBLE_DEVICES" "void" -}}{{- end -}}
{{- $given := list -}}
{{- range .env -}}{{- $given = append $given .name -}}{{- end -}}
{{- range $name, $value := $own }}
{{- if not (has $name $given) }}
- {name: {{ $name }}, value: {{ $value }}}
{{- end }}
{{- end }}
{{- $cores := or (dig "requests" "cpu" "" .resources) (dig "limits" "cpu" "" .resources) -}}
{{- if and (eq $device "cpu") $cores (not (has "OMP_NUM_THREADS" $given)) }}
- name: OMP_NUM_THREADS
  # Whole cores, rounded up.
  valueFrom: {resourceFieldRef: {resource: requests.cpu, divisor: "1"}}
{{- end }}
{{- end -}}

{{- define "chiasm.tracingEnv" -}}
{{- if .Values.tracing.enabled }}
{{- $attributes := dict "k8s.namespace.name" .Release.Namespace "k8s.pod.name" "$(POD_NAME)" -}}
{{- $attributes = merge (deepCopy .Values.tracing.resourceAttributes) $attributes -}}
{{- $pairs := list -}}
{{- range $name, $value := $attributes -}}
{{- $pairs = append $pairs (printf "%s=%s" $name $value) -}}
{{- end }}
- {name: OTEL_EXPORTER_OTLP_ENDPOINT, value: {{ .Values.tracing.endpoint | quote }}}
- {name: OTEL_EXPORTER_OTLP_PROTOCOL, value: {{ .Values.tracing.protocol }}}
- {name: OTEL_TRACES_SAMPLER, value: {{ .Values.tracing.sampler }}}
- {name: OTEL_TRACES_SAMPLER_ARG, value: {{ .Values.tracing.samplerArg | quote }}}
- {name: OTEL_RESOURCE_ATTRIBUTES, value: {{ join "," $pairs | quote }}}
{{- with .Values.tracing.headersSecret }}
{{- if .name }}
- name: OTEL_EXPORTER_OTLP_HEADERS
  valueFrom: {secretKeyRef: {name: {{ .name }}, key: {{ .key }}}}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{/* What only the orchestrator is told: root. */}}
{{- define "chiasm.orchestratorEnv" -}}
{{- $scaling := include "chiasm.orchestratorScaling" . }}
- name: CHIASM_NAMESPACE
  valueFrom: {fieldRef: {fieldPath: metadata.namespace}}
- {name: CHIASM_ELECTION_LEASE, value: {{ include "chiasm.lease" . | quote }}}
- {name: CHIASM_SCALING, value: {{ $scaling | quote }}}
{{- if ne $scaling "off" }}
- {name: CHIASM_BACKEND, value: kubernetes}
- {name: CHIASM_WORKLOAD_PREFIX, value: {{ include "chiasm.fullname" . | quote }}}
{{- range $component, $spec := include "chiasm.components" . | fromYaml }}
{{- if eq $spec.kind "StatefulSet" }}
{{- $bounds := include "chiasm.bounds" $spec.values | fromJsonArray }}
{{- $prefix := printf "CHIASM_%s" (upper $component | replace "-" "_") }}
- {name: {{ $prefix }}_MIN, value: {{ include "chiasm.scalar" (first $bounds) | quote }}}
- {name: {{ $prefix }}_MAX, value: {{ include "chiasm.scalar" (last $bounds) | quote }}}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}
