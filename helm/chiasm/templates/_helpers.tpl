{{/* Names, labels and small conversions. */}}

{{/* What the names of all objects begin with: a DNS label, as those of Services must be one. */}}
{{- define "chiasm.fullname" -}}
{{- $name := .Values.fullnameOverride -}}
{{- if not $name -}}
{{- $name = default .Chart.Name .Values.nameOverride -}}
{{- $name = contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name) -}}
{{- end -}}
{{- $name | replace "." "-" | trunc 36 | trimAll "-" -}}
{{- end -}}

{{- define "chiasm.chart" -}}
{{- printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* What selects all pods of the release. */}}
{{- define "chiasm.releaseLabels" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{/* What selects the pods of a component: root, component. */}}
{{- define "chiasm.selectorLabels" -}}
{{ include "chiasm.releaseLabels" .root }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* Labels of an object: root, and component where it belongs to one. */}}
{{- define "chiasm.labels" -}}
helm.sh/chart: {{ include "chiasm.chart" .root }}
{{ include "chiasm.releaseLabels" .root }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/part-of: chiasm
{{- end -}}

{{/* An image reference: root, image (fields that differ). */}}
{{- define "chiasm.image" -}}
{{- $image := mergeOverwrite (deepCopy .root.Values.image) (deepCopy .image) -}}
{{- $repository := $image.repository -}}
{{- with .root.Values.global.imageRegistry -}}
{{- $repository = printf "%s/%s" (trimSuffix "/" .) $repository -}}
{{- end -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $repository (default .root.Chart.AppVersion $image.tag) -}}
{{- end -}}
{{- end -}}

{{- define "chiasm.pullPolicy" -}}
{{- (mergeOverwrite (deepCopy .root.Values.image) (deepCopy .image)).pullPolicy -}}
{{- end -}}

{{/* A value as the text of an environment variable; numbers without an exponent. */}}
{{- define "chiasm.scalar" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) -}}{{ int64 . }}{{- else -}}{{ . }}{{- end -}}
{{- end -}}

{{/* host:port of the orchestrator. */}}
{{- define "chiasm.orchestrator" -}}
{{- printf "%s-orchestrator.%s.svc:9000" (include "chiasm.fullname" .) .Release.Namespace -}}
{{- end -}}

{{/* Name of the Lease by which orchestrators choose their leader. */}}
{{- define "chiasm.lease" -}}
{{- printf "%s-orchestrator" (include "chiasm.fullname" .) -}}
{{- end -}}

{{/* Name in the certificate of the services. */}}
{{- define "chiasm.tlsName" -}}
{{- default (printf "%s.internal" (include "chiasm.fullname" .)) .Values.tls.name -}}
{{- end -}}

{{/* Secret of the services' certificate. */}}
{{- define "chiasm.tlsSecret" -}}
{{- default (printf "%s-tls" (include "chiasm.fullname" .)) .Values.tls.existingSecret -}}
{{- end -}}

{{/* Secret of the gateway's own certificate; empty when it has none. */}}
{{- define "chiasm.gatewayTlsSecret" -}}
{{- if .Values.tls.gateway.existingSecret -}}
{{- .Values.tls.gateway.existingSecret -}}
{{- else if .Values.tls.gateway.certManager.issuerRef -}}
{{- printf "%s-gateway-tls" (include "chiasm.fullname" .) -}}
{{- end -}}
{{- end -}}

{{/* A name in the certificate that clients of the gateway see, as far as the chart knows one. */}}
{{- define "chiasm.gatewayTlsName" -}}
{{- if not (include "chiasm.gatewayTlsSecret" .) -}}
{{- include "chiasm.tlsName" . -}}
{{- else if not .Values.tls.gateway.existingSecret -}}
{{- first .Values.tls.gateway.certManager.dnsNames -}}
{{- end -}}
{{- end -}}

{{/* "true" when the port of a component is encrypted: root, component. */}}
{{- define "chiasm.hasTls" -}}
{{- if or .root.Values.tls.enabled (and (eq .component "gateway") (include "chiasm.gatewayTlsSecret" .root)) -}}
true
{{- end -}}
{{- end -}}

{{- define "chiasm.authSecret" -}}
{{- default (printf "%s-api-keys" (include "chiasm.fullname" .)) .Values.auth.existingSecret -}}
{{- end -}}

{{- define "chiasm.serviceAccount" -}}
{{- $names := .root.Values.serviceAccount -}}
{{- $fullname := include "chiasm.fullname" .root -}}
{{- if eq .component "orchestrator" -}}
{{- ternary (printf "%s-orchestrator" $fullname) $names.orchestratorName $names.create -}}
{{- else -}}
{{- ternary $fullname $names.name $names.create -}}
{{- end -}}
{{- end -}}

{{/* The first of several versions of a group that the cluster has: root, versions. */}}
{{- define "chiasm.apiVersion" -}}
{{- $found := "" -}}
{{- range .versions -}}
{{- if and (not $found) ($.root.Capabilities.APIVersions.Has .) -}}
{{- $found = . -}}
{{- end -}}
{{- end -}}
{{- $found -}}
{{- end -}}
